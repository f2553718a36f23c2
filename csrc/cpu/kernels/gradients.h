// What one thread does to one chunk of a gradient.
#pragma once

#include "math/dtype.h"
#include "math/moments.h"
#include "math/philox.h"

namespace mmbal {

struct GradientKernels {
  // Mean and M2 of data[0 .. count), 0 < count <= kChunk.
  Partial (*moments[kDTypes])(const void* data, int64_t count);

  // data[i] <- k * data[i]; returns whether every element was finite.
  bool (*scale[kDTypes])(void* data, int64_t count, double k);

  // data[i] <- k * data[i] + amplitude * normal(key, index + i).
  void (*scale_and_add_noise[kDTypes])(void* data, int64_t count, double k, double amplitude,
                                       const NoiseKey& key, uint64_t index);

  // data[i] <- normal(key, index + i).
  void (*noise[kDTypes])(void* data, int64_t count, const NoiseKey& key, uint64_t index);

  // Philox itself; rounds is 7 or 10.
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]);
};

}  // namespace mmbal
