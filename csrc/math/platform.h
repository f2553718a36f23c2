// What differs between a host compiler and nvcc, and the scalar policy that the formulas are
// written against. csrc/cpu/simd.h has the vector policy with the same members.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMBAL_HD __host__ __device__ __forceinline__
#define MMBAL_UNROLL _Pragma("unroll")
#else
#define MMBAL_UNROLL
#define MMBAL_HD inline __attribute__((always_inline))
#endif

namespace mmbal {
namespace {  // every instruction set compiles its own copy; none may be shared by the linker

// One float. Products and sums are never contracted by the compiler; where a fused multiply-add is
// meant it is written as fma, so that every backend rounds alike.
struct Scalar {
  using F = float;
  using U = uint32_t;

  static MMBAL_HD F fma(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fmaf(a, b, c);
#endif
  }
  // For 2^-101 <= x only. On CUDA this is what __fsqrt_rn does there, without its branch for the
  // rest: a residual that is exact corrects the seed to the nearest float. Of all mantissas and all
  // seeds that keep PTX's error bound two pairs would round wrong; no device has those seeds, or
  // its __fsqrt_rn were wrong.
  static MMBAL_HD F sqrt(F x) {
#if defined(__CUDA_ARCH__)
    float seed;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(seed) : "f"(x));
    const float root = __fmul_rn(x, seed);
    return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(seed, 0.5f), root);
#else
    return std::sqrt(x);
#endif
  }
  static MMBAL_HD U bits(F x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    U u;
    std::memcpy(&u, &x, sizeof u);
    return u;
#endif
  }
  static MMBAL_HD F from_bits(U u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    F x;
    std::memcpy(&x, &u, sizeof x);
    return x;
#endif
  }
  static MMBAL_HD U splat(uint32_t u) { return u; }
  static MMBAL_HD F splat(float x) { return x; }
  // Nearest float of the bits read as a signed integer.
  static MMBAL_HD F from_signed(U u) { return static_cast<F>(static_cast<int32_t>(u)); }
  static MMBAL_HD U shift_right_signed(U u, int n) {
    return static_cast<U>(static_cast<int32_t>(u) >> n);
  }
  // b where the top bit of mask is set, else a.
  static MMBAL_HD F select(U mask, F a, F b) {
#if defined(__CUDA_ARCH__)
    float chosen;  // the compiler would move the bit to the bottom first
    asm("slct.f32.s32 %0, %1, %2, %3;" : "=f"(chosen) : "f"(a), "f"(b), "r"(mask));
    return chosen;
#else
    return static_cast<int32_t>(mask) < 0 ? b : a;
#endif
  }
  static MMBAL_HD F max(F a, F b) { return a > b ? a : b; }
  static MMBAL_HD void multiply_wide(U a, uint32_t b, U& high, U& low) {
#if defined(__CUDA_ARCH__)
    // One instruction; from the 64-bit product the compiler makes two.
    asm("{ .reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
#else
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<U>(product >> 32);
    low = static_cast<U>(product);
#endif
  }
};

// One double: elements of float64, whose products are rounded before they are added.
struct WideScalar {
  using F = double;

  static MMBAL_HD F fma(F a, F b, F c) { return a * b + c; }
};

}  // namespace
}  // namespace mmbal
