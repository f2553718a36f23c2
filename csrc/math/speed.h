// Conditional learning speed: one group's mu = |gradients|^2 / |weights|^2.
// Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep
// Neural Networks", ICML 2022.
#pragma once

#include "math/moments.h"

namespace mmbal {
namespace {

// Squared norm of the tensors `first`, `first` + `stride`, ... of a group. Tensors that are not in
// it are skipped, not multiplied by 0: they may hold Inf.
MMBAL_HD double group_norm(const double* moments, const double* membership, int64_t tensors,
                           int64_t first, int64_t stride) {
  double sum = 0;
  for (int64_t t = first; t < tensors; t += stride) {
    const double* row = moments + 3 * t;
    if (membership[t] > 0) sum += membership[t] * squared_norm(row[0], row[1], row[2]);
  }
  return sum;
}

}  // namespace
}  // namespace mmbal
