#include "cpu/kernels/gradients.h"

#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/update.h"

namespace mmbal {

template <>
const GradientKernels& kernels_for<GradientKernels, Isa::MMBAL_ISA>() {
  static constexpr GradientKernels table{
      {moments<float>, moments_in_double<double>, moments<Half>, moments<BFloat16>},
      MMBAL_FOR_EACH_DTYPE(scale),
      MMBAL_FOR_EACH_DTYPE(scale_and_add_noise),
      MMBAL_FOR_EACH_DTYPE(noise),
      philox,
  };
  return table;
}

}  // namespace mmbal
