// The vector policy: the members of mmbal::Scalar on kWidth lanes, for the instruction set that
// this file is compiled for, and loads, stores and reductions over them.
#pragma once

#include <type_traits>
#include <utility>

#include "math/convert.h"
#include "math/normal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mmbal {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float FloatVector __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UintVector __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVector __attribute__((vector_size(4 * kWidth)));

struct Simd {
  using F = FloatVector;
  using U = UintVector;

  static MMBAL_HD F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    F result;
    for (int i = 0; i < kWidth; ++i) result[i] = std::fmaf(a[i], b[i], c[i]);
    return result;
#endif
  }
  static MMBAL_HD F sqrt(F x) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (F)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (F)vsqrtq_f32((float32x4_t)x);
#else
    F result;
    for (int i = 0; i < kWidth; ++i) result[i] = std::sqrt(x[i]);
    return result;
#endif
  }
  static MMBAL_HD U bits(F x) { return (U)x; }
  static MMBAL_HD F from_bits(U u) { return (F)u; }
  static MMBAL_HD U splat(uint32_t u) { return u - U{}; }
  static MMBAL_HD F splat(float x) { return x - F{}; }
  static MMBAL_HD F from_signed(U u) { return __builtin_convertvector((IntVector)u, F); }
  static MMBAL_HD U shift_right_signed(U u, int n) { return (U)((IntVector)u >> n); }
  static MMBAL_HD F select(U mask, F a, F b) {
#if defined(__AVX512DQ__)
    return (F)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F)_mm256_blendv_ps((__m256)a, (__m256)b, (__m256)mask);
#else
    return (IntVector)mask < 0 ? b : a;
#endif
  }
  static MMBAL_HD F max(F a, F b) { return a > b ? a : b; }
#if !defined(__x86_64__)
  static MMBAL_HD void multiply_wide(U a, uint32_t b, U& high, U& low) {
#if defined(__aarch64__)
    const uint32x4_t v = (uint32x4_t)a;
    const uint64x2_t first = vmull_n_u32(vget_low_u32(v), b);
    const uint64x2_t second = vmull_high_n_u32(v, b);
    high = (U)vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
    low = (U)vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
#else
    for (int i = 0; i < kWidth; ++i) {
      const uint64_t product = (uint64_t)a[i] * b;
      high[i] = (uint32_t)(product >> 32);
      low[i] = (uint32_t)product;
    }
#endif
  }
#endif
};

// Calls f(0) ... f(kCount - 1) with constants: arrays of vectors that are indexed with them stay in
// registers, where a loop, unrolled too late, would write them to memory in every round.
template <int... kIndex, class F>
MMBAL_HD void for_each_index(std::integer_sequence<int, kIndex...>, F&& f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class F>
MMBAL_HD void unroll(F&& f) {
  for_each_index(std::make_integer_sequence<int, kCount>{}, f);
}

// Lanes of two vectors, alike in each 128 bits of them; last the numbers of the lanes in the first.
#if defined(__AVX512F__)
typedef __m512 Native;
#define MMBAL_SHUFFLE(name, instruction, ...)               \
  MMBAL_HD FloatVector name(FloatVector a, FloatVector b) { \
    return (FloatVector)_mm512_##instruction;               \
  }
#elif defined(__AVX2__)
typedef __m256 Native;
#define MMBAL_SHUFFLE(name, instruction, ...)               \
  MMBAL_HD FloatVector name(FloatVector a, FloatVector b) { \
    return (FloatVector)_mm256_##instruction;               \
  }
#elif defined(__clang__)
#define MMBAL_SHUFFLE(name, instruction, ...)               \
  MMBAL_HD FloatVector name(FloatVector a, FloatVector b) { \
    return __builtin_shufflevector(a, b, __VA_ARGS__);      \
  }
#else
#define MMBAL_SHUFFLE(name, instruction, ...)               \
  MMBAL_HD FloatVector name(FloatVector a, FloatVector b) { \
    return __builtin_shuffle(a, b, IntVector{__VA_ARGS__}); \
  }
#endif
MMBAL_SHUFFLE(evens, shuffle_ps((Native)a, (Native)b, 0x88), 0, 2, 4, 6)
MMBAL_SHUFFLE(odds, shuffle_ps((Native)a, (Native)b, 0xdd), 1, 3, 5, 7)
MMBAL_SHUFFLE(low_halves, shuffle_ps((Native)a, (Native)b, 0x44), 0, 1, 4, 5)
MMBAL_SHUFFLE(high_halves, shuffle_ps((Native)a, (Native)b, 0xee), 2, 3, 6, 7)
MMBAL_SHUFFLE(zip_low, unpacklo_ps((Native)a, (Native)b), 0, 4, 1, 5)
MMBAL_SHUFFLE(zip_high, unpackhi_ps((Native)a, (Native)b), 2, 6, 3, 7)

// Unaligned loads and stores of kWidth elements, computed in float32.

MMBAL_HD FloatVector load(const float* p) {
  FloatVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MMBAL_HD void store(float* p, FloatVector v) { std::memcpy(p, &v, sizeof v); }

MMBAL_HD FloatVector load(const BFloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * kWidth)));
  Narrow n;
  std::memcpy(&n, p, sizeof n);
  return (FloatVector)(__builtin_convertvector(n, UintVector) << 16);
}
// float32 rounded to bfloat16, the upper half of each lane; the lower half is rubbish. A NaN of
// bfloat16 arithmetic has an empty lower half: the sum does not carry out of it.
MMBAL_HD UintVector rounded_to_upper_half(FloatVector v) {
  const UintVector u = (UintVector)v;
  return u + 0x7fffu + ((u >> 16) & 1u);
}
MMBAL_HD void store(BFloat16* p, FloatVector v) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * kWidth)));
  const UintVector rounded = rounded_to_upper_half(v) >> 16;
#if defined(__AVX512F__)
  const __m256i n = _mm512_cvtepi32_epi16((__m512i)rounded);
#elif defined(__AVX2__)
  const __m128i n = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)rounded),
                                     _mm256_extracti128_si256((__m256i)rounded, 1));
#else
  const Narrow n = __builtin_convertvector(rounded, Narrow);
#endif
  std::memcpy(p, &n, sizeof(Narrow));
}

// bfloat16 by twos, a pair to a lane: half as many instructions as one by one.
MMBAL_HD FloatVector load_pairs(const BFloat16* p) {
  FloatVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MMBAL_HD void store_pairs(BFloat16* p, FloatVector v) { std::memcpy(p, &v, sizeof v); }
MMBAL_HD FloatVector first_of_pairs(FloatVector v) { return (FloatVector)((UintVector)v << 16); }
MMBAL_HD FloatVector second_of_pairs(FloatVector v) {
  return (FloatVector)((UintVector)v & 0xffff0000u);
}
MMBAL_HD FloatVector join_pairs(FloatVector first, FloatVector second) {
  const UintVector low = rounded_to_upper_half(first) >> 16;
  const UintVector high = rounded_to_upper_half(second);
#if defined(__AVX512F__)
  return (FloatVector)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#else
  return (FloatVector)(low | (high & 0xffff0000u));
#endif
}

MMBAL_HD FloatVector load(const Half* p) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (FloatVector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  FloatVector v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
MMBAL_HD void store(Half* p, FloatVector v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = to_half(v[i]);
#endif
}

// The integers of Philox on kWidth lanes. x86 multiplies 32-bit numbers that lie in 64-bit lanes,
// so its counters stay there, every other one in `odd`, and nothing is moved between rounds. The
// upper halves hold what multiplication ignores.
#if defined(__x86_64__)
struct PhiloxLanes {
  struct U {
    UintVector even, odd;
    friend MMBAL_HD U operator^(const U& a, const U& b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
  };

  static MMBAL_HD U splat(uint32_t u) { return {Simd::splat(u), Simd::splat(u)}; }
  static MMBAL_HD void multiply_wide(const U& a, uint32_t b, U& high, U& low) {
    low = {multiply(a.even, b), multiply(a.odd, b)};
    high = {upper(low.even), upper(low.odd)};
  }
  // kWidth numbers, of which each 128 bits go to two 64-bit lanes of even and of odd.
  static MMBAL_HD U widen(UintVector u) {
    const FloatVector lanes = (FloatVector)u;
    return {(UintVector)zip_low(lanes, lanes), (UintVector)zip_high(lanes, lanes)};
  }
  static MMBAL_HD UintVector narrow(const U& u) {
    return (UintVector)evens((FloatVector)u.even, (FloatVector)u.odd);
  }

 private:
#if defined(__AVX512F__)
  static MMBAL_HD UintVector multiply(UintVector a, uint32_t b) {
    return (UintVector)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)b));
  }
  static MMBAL_HD UintVector upper(UintVector a) {
    return (UintVector)_mm512_srli_epi64((__m512i)a, 32);
  }
#elif defined(__AVX2__)
  static MMBAL_HD UintVector multiply(UintVector a, uint32_t b) {
    return (UintVector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b));
  }
  static MMBAL_HD UintVector upper(UintVector a) {
    return (UintVector)_mm256_srli_epi64((__m256i)a, 32);
  }
#else
  static MMBAL_HD UintVector multiply(UintVector a, uint32_t b) {
    return (UintVector)_mm_mul_epu32((__m128i)a, _mm_set1_epi32((int)b));
  }
  static MMBAL_HD UintVector upper(UintVector a) {
    return (UintVector)_mm_srli_epi64((__m128i)a, 32);
  }
#endif
};
#else
struct PhiloxLanes : Simd {
  static MMBAL_HD U widen(U u) { return u; }
  static MMBAL_HD U narrow(U u) { return u; }
};
#endif

// What one Philox call per lane makes: element j of a lane's block is in z_j, and block_of_lane
// says which of kWidth blocks that is. transform_group(x, z, f) does x <- f(x, z) for the 4 kWidth
// elements from x on. Both depend on the type, so that nothing crosses 128 bits.

template <class T>
MMBAL_HD UintVector block_of_lane(const T*) {
  UintVector v;
  for (int i = 0; i < kWidth; ++i) v[i] = (uint32_t)((i % 4) * (kWidth / 4) + i / 4);
  return v;
}
template <class T, class F>
MMBAL_HD void transform_group(T* x, const Quad<FloatVector>& z, F&& f) {
  const FloatVector z01[2] = {zip_low(z.z0, z.z1), zip_high(z.z0, z.z1)};
  const FloatVector z23[2] = {zip_low(z.z2, z.z3), zip_high(z.z2, z.z3)};
  const FloatVector v[4] = {low_halves(z01[0], z23[0]), high_halves(z01[0], z23[0]),
                            low_halves(z01[1], z23[1]), high_halves(z01[1], z23[1])};
  for (int j = 0; j < 4; ++j) store(x + j * kWidth, f(load(x + j * kWidth), v[j]));
}

// A block of bfloat16 is two words: those with elements 0 and 1 are taken apart from those with 2
// and 3, so that the normals need no transposition.
MMBAL_HD UintVector block_of_lane(const BFloat16*) {
  UintVector v;
  for (int i = 0; i < kWidth; ++i) v[i] = (uint32_t)(i / 4 * 2 + i % 2 + i % 4 / 2 * (kWidth / 2));
  return v;
}
template <class F>
MMBAL_HD void transform_group(BFloat16* x, const Quad<FloatVector>& z, F&& f) {
  const FloatVector a = load_pairs(x);
  const FloatVector b = load_pairs(x + 2 * kWidth);
  const FloatVector words01 = evens(a, b);
  const FloatVector words23 = odds(a, b);
  const FloatVector y01 =
      join_pairs(f(first_of_pairs(words01), z.z0), f(second_of_pairs(words01), z.z1));
  const FloatVector y23 =
      join_pairs(f(first_of_pairs(words23), z.z2), f(second_of_pairs(words23), z.z3));
  store_pairs(x, zip_low(y01, y23));
  store_pairs(x + 2 * kWidth, zip_high(y01, y23));
}

}  // namespace
}  // namespace mmbal
