// Arguments of the dot products over pairs of gradients.
#pragma once

#include "math/dots.h"
#include "operations/gradients.h"

namespace mmbal {

// Writes the dots of first[p] and second[p] to row first[p].row of out [T, 3].
struct GradientDots {
  const Gradient* first;
  const void* const* second;  // each as large as, of the type of, and in the order of its first
  int64_t count;              // pairs, may be 0
  double* out;
};

}  // namespace mmbal
