// Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// address of a gradient's element in its output.
#pragma once

#include "math/platform.h"

namespace mmbal {

// Which stream of numbers: (seed, step, tensor id). The element's position selects the number.
struct NoiseKey {
  uint64_t seed;
  uint32_t step;
  uint32_t tensor_id;
};

namespace {

constexpr int kPhiloxRounds = 10;

template <class U>
struct Words {
  U w0, w1, w2, w3;
};

template <class V, int Rounds = kPhiloxRounds>
MMBAL_HD Words<typename V::U> philox4x32(Words<typename V::U> counter, uint32_t key0,
                                         uint32_t key1) {
  using U = typename V::U;
  U c0 = counter.w0, c1 = counter.w1, c2 = counter.w2, c3 = counter.w3;
  MMBAL_UNROLL
  for (int round = 0; round < Rounds; ++round) {
    U high0, low0, high1, low1;
    V::multiply_wide(c0, 0xD2511F53u, high0, low0);
    V::multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ V::splat(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ V::splat(key1);
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The four words of one block: elements 4 * block to 4 * block + 3 of a tensor.
template <class V>
MMBAL_HD Words<typename V::U> noise_words(const NoiseKey& key, typename V::U block_low,
                                          typename V::U block_high) {
  return philox4x32<V>({block_low, block_high, V::splat(key.tensor_id), V::splat(key.step)},
                       static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

}  // namespace
}  // namespace mmbal
