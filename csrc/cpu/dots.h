// Dots of a chunk.
#pragma once

#include "cpu/lanes.h"
#include "math/dots.h"

namespace mmbal {
namespace {

// Running sums, the same on every instruction set: as many as 3 of them leave registers for.
constexpr int kDotLanes = 16;

template <class T>
Dots dots(const void* first, const void* second, int64_t count) {
  const T* x = static_cast<const T*>(first);
  const T* y = static_cast<const T*>(second);
  double sums[3][kDotLanes] = {};
  const auto add_lanes = [&](const auto* a, const auto* b, int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double u = to_double(a[lane]);
      const double v = to_double(b[lane]);
      sums[0][lane] += u * u;
      sums[1][lane] += u * v;
      sums[2][lane] += v * v;
    }
  };
  int64_t i = 0;
  for (; i + kDotLanes <= count; i += kDotLanes) {
    if constexpr (sizeof(T) == 2) {
      float a[kDotLanes], b[kDotLanes];
      for (int j = 0; j < kDotLanes; j += kWidth) {
        store(a + j, load(x + i + j));
        store(b + j, load(y + i + j));
      }
      add_lanes(a, b, kDotLanes);
    } else {
      add_lanes(x + i, y + i, kDotLanes);
    }
  }
  add_lanes(x + i, y + i, count - i);
  return {pairwise_sum(sums[0]), pairwise_sum(sums[1]), pairwise_sum(sums[2])};
}

}  // namespace
}  // namespace mmbal
