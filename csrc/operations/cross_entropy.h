// Arguments of the blended cross-entropy and its backward.
#pragma once

#include "math/dtype.h"

namespace mmbal {

// Cross-entropies of K heads for one target, and their weighted sum.
struct CrossEntropy {
  const void* const* logits;  // K pointers to [rows, classes]
  const DType* dtypes;        // K, all of them float64 or none
  int64_t heads, rows, classes;
  const int64_t* labels;  // [rows], or null:
  const void* soft;       // [rows, classes], as all below float64 if the logits are, else float32
  int64_t ignore_index;
  double smoothing;
  const double* weights;  // [K]
  // Written by the forward, read by the backward.
  void* normalizers;  // [2, K, rows]: maximum of each row, log of its sum of exp(x - maximum)
  int64_t* count;     // rows that are not ignored
  // Written by the forward.
  void* loss;
  void* losses;  // [K]

  bool wide() const { return dtypes[0] == DType::kFloat64; }
};

struct CrossEntropyBackward : CrossEntropy {
  const void* grad;    // of the loss
  void* const* grads;  // K pointers to [rows, classes]: where those of the logits go
};

}  // namespace mmbal
