// Standard normals from random words by Box-Muller, bit for bit the same on every backend:
// u = (a + 0.5) 2^-32, theta = 2 pi (b + 0.5) 2^-32, (r cos theta, r sin theta), r = sqrt(-2 ln u).
// The polynomials are minimax fits; their errors (stated below) are under half a unit in the last
// place of the result, beside the rounding of the evaluation.
#pragma once

#include "math/philox.h"

namespace mmbal {
namespace {

// -2 ln((word + 0.5) 2^-32), relative error of the fit 2.6e-8.
template <class V>
MMBAL_HD typename V::F minus_two_log_uniform(typename V::U word) {
  using F = typename V::F;
  using U = typename V::U;
  // u or 1 - u, whichever is below a half: float32 has no room for the digits of u near 1, and
  // the smallest radii are made of them.
  const U upper = V::shift_right_signed(word, 31);
  const F tail = V::fma(V::from_signed(word ^ upper), V::splat(0x1p-32f), V::splat(0x1p-33f));
  const F u = V::select(word, tail, V::splat(1.0f) - tail);
  // u = m 2^e with m in [sqrt(1/2), sqrt(2)), and f = m - 1: without rounding where e is 0.
  const U shifted = V::bits(u) - V::splat(0x3f3504f3u);
  const F e = V::from_signed(V::shift_right_signed(shifted, 23));
  const F m = V::from_bits((shifted & V::splat(0x007fffffu)) + V::splat(0x3f3504f3u));
  const F f = V::select(shifted, -tail, m - V::splat(1.0f));
  F p = V::splat(-0.1744471f);
  p = V::fma(p, f, V::splat(0.287336856f));
  p = V::fma(p, f, V::splat(-0.299045335f));
  p = V::fma(p, f, V::splat(0.331247862f));
  p = V::fma(p, f, V::splat(-0.399136671f));
  p = V::fma(p, f, V::splat(0.500041481f));
  p = V::fma(p, f, V::splat(-0.666683713f));
  p = V::fma(p, f, V::splat(0.999999759f));
  p = V::fma(p, f, V::splat(-2.0f));
  return V::fma(p, f, e * V::splat(-1.38629436f));
}

// cos and sin of 2 pi (word + 0.5) 2^-32, absolute error of the fit 3.3e-8.
template <class V>
MMBAL_HD void cos_sin_turn(typename V::U word, typename V::F& cosine, typename V::F& sine) {
  using F = typename V::F;
  using U = typename V::U;
  // Nearest quarter turn in the top two bits of `turned`; the rest, in [-1/8, 1/8) turns, exactly.
  const U turned = word + V::splat(0x20000000u);
  const F t =
      V::fma(V::from_signed(word << 2), V::splat(0x1.921fb6p-32f), V::splat(0x1.921fb6p-31f));
  const F z = t * t;
  F s = V::fma(V::splat(-0.000195172994f), z, V::splat(0.008332178f));
  s = V::fma(s, z, V::splat(-0.166666552f));
  s = V::fma(s * z, t, t);
  F c = V::fma(V::splat(-0.0013597823f), z, V::splat(0.041656293f));
  c = V::fma(c, z, V::splat(-0.499998957f));
  c = V::fma(c, z, V::splat(1.0f));
  const U odd = turned << 1;
  const U sign = V::splat(0x80000000u);
  cosine = V::from_bits(V::bits(V::select(odd, c, s)) ^ ((turned + V::splat(0x40000000u)) & sign));
  sine = V::from_bits(V::bits(V::select(odd, s, c)) ^ (turned & sign));
}

template <class F>
struct Quad {
  F z0, z1, z2, z3;
};

template <class V>
MMBAL_HD Quad<typename V::F> normals(const Words<typename V::U>& words) {
  using F = typename V::F;
  F cos0, sin0, cos1, sin1;
  const F r0 = V::sqrt(minus_two_log_uniform<V>(words.w0));
  const F r1 = V::sqrt(minus_two_log_uniform<V>(words.w2));
  cos_sin_turn<V>(words.w1, cos0, sin0);
  cos_sin_turn<V>(words.w3, cos1, sin1);
  return {r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1};
}

}  // namespace
}  // namespace mmbal
