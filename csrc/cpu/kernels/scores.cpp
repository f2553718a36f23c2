#include "cpu/kernels/scores.h"

#include "cpu/dispatch.h"
#include "cpu/scores.h"

namespace mmbal {

template <>
const ScoreKernels& kernels_for<ScoreKernels, Isa::MMBAL_ISA>() {
  static constexpr ScoreKernels table{
      MMBAL_FOR_EACH_DTYPE(hard_score),
      MMBAL_FOR_EACH_DTYPE(soft_score),
      MMBAL_FOR_EACH_DTYPE(multi_label_score),
  };
  return table;
}

}  // namespace mmbal
