// The normals of a run of elements.
#pragma once

#include "cpu/lanes.h"
#include "math/normal.h"

namespace mmbal {
namespace {

constexpr int kGroup = 4 * kWidth;  // elements that one vector Philox call makes

// Calls sink(i, z) with the normals of elements index + i .. index + i + kGroup - 1, for
// i = 0, kGroup, ... below count; index must be a multiple of 4. The last call may pass the end.
// `lane` is block_of_lane of the type that they are for.
template <class Sink>
MMBAL_HD void for_each_group(const NoiseKey key, uint64_t index, int64_t count,
                             const UintVector lane, Sink&& sink) {
  const auto words_of = [&](uint64_t block) {
    const UintVector low = lane + static_cast<uint32_t>(block);
    // Where the low word wrapped, the comparison is -1: the carry.
    const UintVector high = static_cast<uint32_t>(block >> 32) - (UintVector)(low < lane);
    const auto words =
        noise_words<PhiloxLanes>(key, PhiloxLanes::widen(low), PhiloxLanes::widen(high));
    return Words<UintVector>{PhiloxLanes::narrow(words.w0), PhiloxLanes::narrow(words.w1),
                             PhiloxLanes::narrow(words.w2), PhiloxLanes::narrow(words.w3)};
  };
  if (count <= 0) return;
  // The words of the next group are computed beside the normals of this one: two chains of
  // dependent operations, where one would leave the processor waiting.
  uint64_t block = index >> 2;
  auto words = words_of(block);
  int64_t i = 0;
  for (; i + kGroup < count; i += kGroup) {
    block += kWidth;
    const auto z = normals<Simd>(words);
    words = words_of(block);
    sink(i, z);
  }
  sink(i, normals<Simd>(words));
}

inline void philox(const uint32_t counter[4], const uint32_t key[2], int rounds,
                   uint32_t words[4]) {
  using V = PhiloxLanes;
  const Words<V::U> c{V::splat(counter[0]), V::splat(counter[1]), V::splat(counter[2]),
                      V::splat(counter[3])};
  const Words<V::U> w =
      rounds == 7 ? philox4x32<V, 7>(c, key[0], key[1]) : philox4x32<V>(c, key[0], key[1]);
  words[0] = V::narrow(w.w0)[0];
  words[1] = V::narrow(w.w1)[0];
  words[2] = V::narrow(w.w2)[0];
  words[3] = V::narrow(w.w3)[0];
}

// Normals for a run that does not start at a block: `buffer` gets the run's blocks, and the run
// starts at the returned offset. The buffer holds kRun + 2 groups.
constexpr int64_t kRun = 1024;

// What noise alone makes of an element and its normal.
MMBAL_HD FloatVector second(FloatVector, FloatVector z) { return z; }

inline const float* normals_of_run(const NoiseKey& key, uint64_t index, int64_t count,
                                   float* buffer) {
  const int64_t skip = static_cast<int64_t>(index & 3);
  for_each_group(
      key, index - static_cast<uint64_t>(skip), count + skip, block_of_lane(buffer),
      [&](int64_t i, const Quad<FloatVector>& z) { transform_group(buffer + i, z, second); });
  return buffer + skip;
}

template <class T>
void noise(void* data, int64_t count, const NoiseKey& key, uint64_t index) {
  T* x = static_cast<T*>(data);
  if ((index & 3) == 0) {
    const int64_t whole = count - count % kGroup;
    for_each_group(key, index, whole, block_of_lane(x), [&](int64_t i, const Quad<FloatVector>& z) {
      transform_group(x + i, z, second);
    });
    x += whole;
    count -= whole;
    index += static_cast<uint64_t>(whole);
  }
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    int64_t i = 0;
    for (; i + kWidth <= run; i += kWidth) store(x + i, load(z + i));
    transform_tail(x + i, run - i, [&](FloatVector) { return load(z + i); });
  }
}

template <>
inline void noise<double>(void* data, int64_t count, const NoiseKey& key, uint64_t index) {
  double* x = static_cast<double*>(data);
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    for (int64_t i = 0; i < run; ++i) x[i] = z[i];
  }
}

}  // namespace
}  // namespace mmbal
