// What one thread does to one chunk of a pair of gradients.
#pragma once

#include "math/dots.h"
#include "math/dtype.h"

namespace mmbal {

struct DotKernels {
  // Of first[0 .. count) and second[0 .. count), 0 < count <= kChunk.
  Dots (*dots[kDTypes])(const void* first, const void* second, int64_t count);
};

}  // namespace mmbal
