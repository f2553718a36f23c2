// Arguments of MMPareto's combination of two gradients.
#pragma once

#include "math/pareto.h"
#include "operations/gradients.h"

namespace mmbal {

// Writes to the gradients G = g1 + g2 of each modality what its weight makes of g1 and g2.
struct Pareto {
  const Gradient* gradients;
  const void* const* own;  // g2 times *scale: each as large as, of the type, in the order of its G
  int64_t count;           // may be 0
  const double* dots;  // [T, 3] of the whole tensors, own ones times *scale; null: measured here
  const float* scale;  // may be null: 1
  double gamma;
  int64_t modalities;
  double* out;  // [2, M]: cosines, weights
};

}  // namespace mmbal
