// float16 and bfloat16 as stored bits, one element at a time. csrc/cpu/simd.h has the vector forms.
#pragma once

#include "math/dtype.h"

#if defined(__CUDA_ARCH__)
#include <cuda_fp16.h>
#endif

namespace mmbal {
namespace {

MMBAL_HD float to_float(BFloat16 x) {
  return Scalar::from_bits(static_cast<uint32_t>(x.bits) << 16);
}

MMBAL_HD BFloat16 to_bfloat16(float x) {
  const uint32_t u = Scalar::bits(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

MMBAL_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return Scalar::from_bits(sign | 0x7f800000u | (magnitude << 13));
  // Exponent by multiplication, which also normalises subnormals.
  const float scaled = Scalar::from_bits(magnitude << 13) * 0x1p112f;
  return Scalar::from_bits(sign | Scalar::bits(scaled));
#endif
}

MMBAL_HD Half to_half(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = Scalar::bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal: adding a constant lines the bits up and rounds to nearest even.
    const float shifted = Scalar::from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (Scalar::bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// Largest finite float16; results saturate there when the gradient itself was finite.
constexpr float kHalfMax = 65504.0f;

// That for two packed float16: `after` with infinities made kHalfMax where `before` was finite.
MMBAL_HD uint32_t saturate_halves(uint32_t before, uint32_t after) {
  // The addition carries into the sign where the exponent is the highest one: not finite.
  const uint32_t infinite = (after & 0x7fff7fffu) + 0x04000400u;
  const uint32_t was_infinite = (before & 0x7c007c00u) + 0x04000400u;
  return after - ((infinite & ~was_infinite & 0x80008000u) >> 15);
}

}  // namespace
}  // namespace mmbal
