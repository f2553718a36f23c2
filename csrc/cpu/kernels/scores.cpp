#include "cpu/kernels/scores.h"

#include "cpu/dispatch.h"
#include "cpu/softmax.h"

namespace mmbal {

template <>
const ScoreKernels& kernels_for<ScoreKernels, Isa::MMBAL_ISA>() {
  static constexpr ScoreKernels table{
      MMBAL_FOR_EACH_DTYPE(row_score),
      MMBAL_FOR_EACH_DTYPE(soft_row_score),
  };
  return table;
}

}  // namespace mmbal
