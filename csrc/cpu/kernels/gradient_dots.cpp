#include "cpu/kernels/gradient_dots.h"

#include "cpu/dispatch.h"
#include "cpu/dots.h"

namespace mmbal {

template <>
const DotKernels& kernels_for<DotKernels, Isa::MMBAL_ISA>() {
  static constexpr DotKernels table{MMBAL_FOR_EACH_DTYPE(dots)};
  return table;
}

}  // namespace mmbal
