// Cross-entropy of one row of logits, and its gradient. A row's label is a distribution
// q' = (1 - smoothing) q + smoothing / classes, where q is one-hot or given (soft labels).
#pragma once

#include "math/platform.h"

namespace mmbal {
namespace {

// Sums over a row, with d = x - (maximum of the row).
template <class A>
struct RowSums {
  A mass;  // of q
  A own;   // of q d; for a one-hot q the label's d
  A all;   // of d; 0 where nothing is smoothed, since it may be infinite
};

// -sum of q' log softmax(x). Never x - logsumexp(x): for large logits that rounds the loss away.
template <class A>
MMBAL_HD A row_loss(A log_sum, const RowSums<A>& sums, A smoothing, A classes) {
  const A mass = (1 - smoothing) * sums.mass + smoothing;
  const A loss = mass * log_sum - (1 - smoothing) * sums.own;
  return smoothing > 0 ? loss - smoothing * (sums.all / classes) : loss;
}

// What the elements of a row's gradient have in common: scale * (mass * softmax - q').
template <class A>
struct RowGradient {
  A softmax;  // scale * mass
  A label;    // scale * (1 - smoothing)
  A uniform;  // scale * smoothing / classes

  MMBAL_HD RowGradient(A scale, A mass, A smoothing, A classes)
      : softmax(scale * ((1 - smoothing) * mass + smoothing)),
        label(scale * (1 - smoothing)),
        uniform(scale * smoothing / classes) {}
};

}  // namespace
}  // namespace mmbal
