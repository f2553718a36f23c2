#include "cpu/cross_entropy.h"

#include "cpu/dispatch.h"

namespace mmbal {

template <>
const CrossEntropyKernels& kernels_for<CrossEntropyKernels, Isa::MMBAL_ISA>() {
  static constexpr CrossEntropyKernels table{
      MMBAL_FOR_EACH_DTYPE(cross_entropy),
      MMBAL_FOR_EACH_DTYPE(cross_entropy_gradient),
  };
  return table;
}

}  // namespace mmbal
