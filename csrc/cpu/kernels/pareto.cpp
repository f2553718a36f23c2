#include "cpu/kernels/pareto.h"

#include "cpu/combine.h"
#include "cpu/dispatch.h"

namespace mmbal {
namespace {

template <class T>
void combine_pair(void* gradient, const void* own, int64_t count, const Combination& by) {
  using F = typename PolicyOf<T>::F;
  const F scale = operand<T>(by.scale);
  const F share = operand<T>(by.share);
  combine(
      static_cast<T*>(gradient), count,
      [&](F g, F x) { return combined<PolicyOf<T>>(g, x, scale, share); },
      static_cast<const T*>(own));
}

}  // namespace

template <>
const ParetoKernels& kernels_for<ParetoKernels, Isa::MMBAL_ISA>() {
  static constexpr ParetoKernels table{MMBAL_FOR_EACH_DTYPE(combine_pair)};
  return table;
}

}  // namespace mmbal
