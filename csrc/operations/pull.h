// Arguments of the pull of weights towards earlier ones.
#pragma once

#include "operations/gradients.h"

namespace mmbal {

// g <- g + coefficients[modality of g] (weight - anchor); writes the sum of the squares of the
// result to squares[row of g].
struct Pull {
  const Gradient* gradients;
  const void* const* weights;  // each as large as, of the type of, and in the order of its gradient
  const void* const* anchors;  // and these
  int64_t count;               // may be 0
  const float* coefficients;   // [M]
  double* squares;             // [T]
};

}  // namespace mmbal
