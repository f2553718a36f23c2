// Arguments of the conditional learning speed.
#pragma once

#include <cstdint>

namespace mmbal {

// totals[g] += |gradients of g|^2 / |weights of g|^2, for all groups or, where one of these is not
// finite, for none.
struct Speeds {
  const double* moments;     // [2, T, 3]: of T weights, then of their gradients
  const double* membership;  // [G, T]: how often a tensor counts in a group
  double* totals;            // [G]
  int64_t groups, tensors;
  const bool* active;  // where false nothing is added; may be null
  bool* finite;        // written: whether all ratios are
};

}  // namespace mmbal
