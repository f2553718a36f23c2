// Loops shared by the threads of torch's pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/floating_mode.h"
#include "math/moments.h"

namespace mmbal {
namespace {

// Work is counted in normals or exponentials, which take about as long. Below this much (40 us) a
// second thread that has to be woken costs more than it brings.
constexpr int64_t kWorkPerThread = 16 * kChunk;
constexpr int64_t kReadsPerWork = 8;  // elements that are measured or scaled meanwhile

inline int useful_threads(int64_t work, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / kWorkPerThread)));
}

// Calls f(i) for i in [0, count), each once, on any thread.
template <class F>
void parallel_for(int64_t count, [[maybe_unused]] int64_t grain, int threads, F&& f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const FloatingMode mode;
#pragma omp for schedule(dynamic, grain)
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

}  // namespace
}  // namespace mmbal
