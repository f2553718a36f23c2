// The pieces of a numerically stable softmax over one row of logits, and of its sigmoids.
#pragma once

#include "math/platform.h"

namespace mmbal {
namespace {

// exp(x) for x <= 0, relative error of the fit 2e-9; flushes to 0 below -87.3, and keeps NaN.
template <class V>
MMBAL_HD typename V::F exp_nonpositive(typename V::F x) {
  using F = typename V::F;
  const F clamped = V::max(V::splat(-88.0f), x);  // NaN in x survives
  // The constant rounds x / ln 2 to an integer in its low bits.
  const F magic = V::splat(12582912.0f);
  const F shifted = V::fma(clamped, V::splat(1.44269504f), magic);
  const F n = shifted - magic;
  F r = V::fma(n, V::splat(-0.693145752f), clamped);
  r = V::fma(n, V::splat(-1.42860677e-6f), r);
  F p = V::splat(0.00139545032f);
  p = V::fma(p, r, V::splat(0.00837502722f));
  p = V::fma(p, r, V::splat(0.041666124f));
  p = V::fma(p, r, V::splat(0.166664168f));
  p = V::fma(p, r, V::splat(0.5f));
  p = V::fma(p, r, V::splat(1.0f));
  p = V::fma(p, r, V::splat(1.0f));
  const F result = V::from_bits(V::bits(p) + (V::bits(shifted) << 23));
  return clamped < V::splat(-87.3f) ? V::splat(0.0f) : result;  // the exponent would wrap
}

// Log-probabilities are from this on: that of 1e-8, as in the released code of AGM.
constexpr double kLogFloor = -18.420680743952367;

MMBAL_HD double floored(double log_probability) {
  return log_probability < kLogFloor ? kLogFloor : log_probability;  // NaN stays
}

// The sigmoids of x and of -x, neither as 1 minus the other.
template <class V>
MMBAL_HD void sigmoids(typename V::F x, typename V::F& up, typename V::F& down) {
  using F = typename V::F;
  const F e = exp_nonpositive<V>(-V::max(x, -x));
  const F large = V::splat(1.0f) / (V::splat(1.0f) + e);
  const F small = e * large;
  up = V::select(V::bits(x), large, small);
  down = V::select(V::bits(x), small, large);
}

}  // namespace
}  // namespace mmbal
