#include "cpu/kernels/pull.h"

#include "cpu/combine.h"
#include "cpu/dispatch.h"
#include "cpu/dots.h"
#include "math/pull.h"

namespace mmbal {
namespace {

template <class T>
double pull(void* gradient, const void* weights, const void* anchors, int64_t count, float beta) {
  T* g = static_cast<T*>(gradient);
  if (pulls(beta)) {
    using F = typename PolicyOf<T>::F;
    const F b = operand<T>(beta);
    combine(
        g, count, [&](F x, F theta, F anchor) { return pulled<PolicyOf<T>>(x, theta, anchor, b); },
        static_cast<const T*>(weights), static_cast<const T*>(anchors));
  }
  return squares(g, count);  // from the first-level cache
}

}  // namespace

template <>
const PullKernels& kernels_for<PullKernels, Isa::MMBAL_ISA>() {
  static constexpr PullKernels table{MMBAL_FOR_EACH_DTYPE(pull)};
  return table;
}

}  // namespace mmbal
