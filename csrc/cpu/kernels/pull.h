// What one thread does to one chunk of a gradient that is pulled.
#pragma once

#include "math/dtype.h"

namespace mmbal {

struct PullKernels {
  // gradient[i] <- gradient[i] + beta (weights[i] - anchors[i]) where beta pulls; returns the sum
  // of the squares of the result. 0 < count <= kChunk.
  double (*pull[kDTypes])(void* gradient, const void* weights, const void* anchors, int64_t count,
                          float beta);
};

}  // namespace mmbal
