// What one thread does to some rows of one head's logits.
#pragma once

#include "math/dtype.h"

namespace mmbal {

// The logits, and what they should be.
struct Rows {
  const void* logits;  // [rows, classes]
  int64_t classes;
  const int64_t* labels;  // [rows], or null:
  const void* soft;       // [rows, classes], float64 if the logits are, else float32; or null
  int64_t ignore_index;
  double smoothing;
  void* top;      // [rows] maximum of each row, in the type of `soft`
  void* log_sum;  // [rows] log of the sum of exp(x - maximum)
};

struct CrossEntropyKernels {
  // Sum of the cross-entropies of rows [first, end); writes their top and log_sum.
  double (*loss[kDTypes])(const Rows& rows, int64_t first, int64_t end);

  // From top and log_sum: scale times the gradients of these rows, to the same rows of `out`.
  void (*gradient[kDTypes])(const Rows& rows, int64_t first, int64_t end, double scale, void* out);
};

}  // namespace mmbal
