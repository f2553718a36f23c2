#include "cpu/kernels/dropping.h"

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace mmbal {
namespace {

template <class T>
void scaled(const void* from, void* to, int64_t count, float factor) {
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  const FloatVector k = Simd::splat(factor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    unroll<kVectors>([&](auto v) { store(y + i + v * kWidth, k * load(x + i + v * kWidth)); });
  }
  for (; i < count; ++i) y[i] = splat_as<T>(factor * static_cast<float>(to_double(x[i])));
}

template <>
void scaled<double>(const void* from, void* to, int64_t count, float factor) {
  const auto* x = static_cast<const double*>(from);
  auto* y = static_cast<double*>(to);
  for (int64_t i = 0; i < count; ++i) y[i] = factor * x[i];
}

}  // namespace

template <>
const DroppingKernels& kernels_for<DroppingKernels, Isa::MMBAL_ISA>() {
  static constexpr DroppingKernels table{MMBAL_FOR_EACH_DTYPE(scaled)};
  return table;
}

}  // namespace mmbal
