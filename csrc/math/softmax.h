// The pieces of a numerically stable softmax over one row of logits.
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

}  // namespace
}  // namespace mmbal
