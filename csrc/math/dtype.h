// The types that gradients and logits may have. A type is its traits here, a vector form of loads
// and stores in csrc/cpu/simd.h and an Element in csrc/cuda/kernels.h.
#pragma once

#include "math/platform.h"

namespace mmbal {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
constexpr int kDTypes = 4;

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

namespace {

// Stored bits; math/convert.h makes numbers of them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What results must stay below: the largest value of a type. Half saturates instead.
template <class T>
constexpr double kLargest = 1.7976931348623157e308;
template <>
constexpr double kLargest<float> = 3.4028234663852886e38;
template <>
constexpr double kLargest<BFloat16> = 3.3895313892515355e38;

}  // namespace

// A function template for each type, in the order of DType.
#define MMBAL_FOR_EACH_DTYPE(f) {f<float>, f<double>, f<Half>, f<BFloat16>}

}  // namespace mmbal
