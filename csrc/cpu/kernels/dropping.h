// What one thread does to one row of features.
#pragma once

#include "math/dtype.h"

namespace mmbal {

struct DroppingKernels {
  // to <- factor * from, in float32 or float64, rounded once.
  void (*scaled[kDTypes])(const void* from, void* to, int64_t count, float factor);
};

}  // namespace mmbal
