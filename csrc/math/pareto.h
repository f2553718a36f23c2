// MMPareto: the gradients of two losses, combined so that neither is worked against.
// Wei, Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024,
// algorithm 1. G = g1 + g2 is what backward leaves, g2 the gradient of the own loss.
#pragma once

#include "math/dots.h"
#include "math/moments.h"

namespace mmbal {

// g <- scale G + share g2.
struct Combination {
  double scale, share;
};

namespace {

// The dots of g1 and g2, from those of G and of g2 times some factor whose inverse is given.
MMBAL_HD Dots dots_of_losses(const Dots& row, double inverse) {
  const double mixed = row.both * inverse;
  const double second = row.second * inverse * inverse;
  const double first = row.first - mixed - (mixed - second);
  return {first > 0 ? first : first * 0, mixed - second, second};
}

// Of a zero gradient 0.
MMBAL_HD double cosine(const Dots& sum) {
  const double lengths = std::sqrt(sum.first) * std::sqrt(sum.second);
  return lengths != 0 ? sum.both / lengths : 0.0;
}

// c of g1, where g2 has 1 - c: 1/2 without conflict, else the shortest convex combination, as the
// released solver has it. NaN where the gradients are not finite.
MMBAL_HD double weight_of_fused(const Dots& sum, double cosine) {
  if (!is_finite(sum.first + sum.both + sum.second)) return NAN;
  if (cosine > 0) return 0.5;
  if (sum.both >= sum.first) return 0.999;
  if (sum.both >= sum.second) return 0.001;
  return (sum.second - sum.both) / (sum.first - 2 * sum.both + sum.second);
}

// Of one tensor: h = 2 (c g1 + (1 - c) g2), not shorter than G, times gamma. A weight that is NaN
// leaves G as it is.
MMBAL_HD Combination combination(const Dots& row, double weight, double gamma, double inverse) {
  if (weight != weight) return {1, 0};
  const double k1 = 2 * weight;
  const double k2 = 2 * (1 - weight);
  const Dots losses = dots_of_losses(row, inverse);
  const double length =
      k1 * k1 * losses.first + 2 * k1 * k2 * losses.both + k2 * k2 * losses.second;
  const double ratio = length > 0 ? std::sqrt(row.first / length) : 1.0;
  const double factor = gamma * (ratio > 1 ? ratio : 1.0);
  return {factor * k1, factor * (k2 - k1) * inverse};
}

template <class V>
MMBAL_HD typename V::F combined(typename V::F g, typename V::F own, typename V::F scale,
                                typename V::F share) {
  return V::fma(share, own, scale * g);
}

}  // namespace
}  // namespace mmbal
