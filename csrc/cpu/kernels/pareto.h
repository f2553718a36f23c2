// What one thread does to one chunk of a gradient that is combined with that of the own loss.
#pragma once

#include "math/dtype.h"
#include "math/pareto.h"

namespace mmbal {

struct ParetoKernels {
  // gradient[i] <- scale gradient[i] + share own[i], 0 < count <= kChunk.
  void (*combine[kDTypes])(void* gradient, const void* own, int64_t count, const Combination& by);
};

}  // namespace mmbal
