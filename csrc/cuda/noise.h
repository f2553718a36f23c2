// The noise of a thread's elements.
#pragma once

#include "cuda/kernels.h"
#include "math/normal.h"

namespace mmbal::cuda {
namespace {

// Elements that a thread updates at a time: whole packets and whole blocks of noise.
template <class T>
constexpr int kGroup = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kGroups = kChunk / kThreads / kGroup<T>;  // of a thread in a chunk

__device__ __forceinline__ NoiseKey noise_key(const NoiseSource& source, uint32_t id) {
  // The counter may be advanced by this very kernel, once every block has read it.
  const int64_t step = source.step_pointer ? __ldcg(source.step_pointer) : source.step;
  return {source.seed, static_cast<uint32_t>(step), id};
}

__device__ __forceinline__ void noise_block(const NoiseKey& key, uint64_t block, float* z) {
  const auto words =
      noise_words<Scalar>(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32));
  const Quad<float> quad = normals<Scalar>(words);
  z[0] = quad.z0;
  z[1] = quad.z1;
  z[2] = quad.z2;
  z[3] = quad.z3;
}

// Noise of kCount elements from a block's first element on.
template <int kCount>
__device__ __forceinline__ void noise_of_blocks(const NoiseKey& key, uint64_t block, float* z) {
  MMBAL_UNROLL
  for (int i = 0; i < kCount; i += 4) noise_block(key, block + static_cast<uint64_t>(i / 4), z + i);
}

// The same from within a block: one block more, and a choice of registers.
template <int kCount>
__device__ __forceinline__ void noise_across_blocks(const NoiseKey& key, uint64_t index, float* z) {
  float blocks[kCount + 4];
  noise_of_blocks<kCount + 4>(key, index >> 2, blocks);
  const auto lane = static_cast<int>(index & 3);
  MMBAL_UNROLL
  for (int i = 0; i < kCount; ++i) {
    z[i] = lane == 1 ? blocks[i + 1] : lane == 2 ? blocks[i + 2] : blocks[i + 3];
  }
}

__device__ __forceinline__ float noise_of_element(const NoiseKey& key, uint64_t index) {
  float z[4];
  noise_block(key, index >> 2, z);
  const auto lane = static_cast<int>(index & 3);
  return lane == 0 ? z[0] : lane == 1 ? z[1] : lane == 2 ? z[2] : z[3];
}

// Some elements in registers. Groups start at 16-byte boundaries.
template <class T>
struct Group {
  using Compute = typename Element<T>::Compute;
  static constexpr int kPackets = kGroup<T> / Element<T>::kPacket;
  uint4 packets[kPackets];

  __device__ __forceinline__ void load(const T* data) {
    MMBAL_UNROLL
    for (int p = 0; p < kPackets; ++p) packets[p] = reinterpret_cast<const uint4*>(data)[p];
  }
  __device__ __forceinline__ void store(T* data) const {
    MMBAL_UNROLL
    for (int p = 0; p < kPackets; ++p) reinterpret_cast<uint4*>(data)[p] = packets[p];
  }
  // packet <- f(packet)
  template <class F>
  __device__ __forceinline__ void each_packet(F&& f) {
    MMBAL_UNROLL
    for (int p = 0; p < kPackets; ++p) packets[p] = f(packets[p]);
  }
  // x <- f(i, x) for element i.
  template <class F>
  __device__ __forceinline__ void transform(F&& f) {
    MMBAL_UNROLL
    for (int p = 0; p < kPackets; ++p) {
      packets[p] = transformed<T>(
          packets[p], [&](int i, Compute x) { return f(p * Element<T>::kPacket + i, x); });
    }
  }
};

}  // namespace
}  // namespace mmbal::cuda
