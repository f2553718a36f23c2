// Lists of tensors that a launch walks together, and sums over the chunks of each tensor.
#pragma once

#include "cuda/kernels.h"

namespace mmbal::cuda {
namespace {

// Tensors of one launch, in two sizes for the reason that Tensors has.
template <int kOthers>
constexpr int kManyOf = kOthers == 1 ? 640 : 560;
template <int kOthers>
constexpr int kFewOf = kOthers == 1 ? 78 : 66;

template <int kOthers, int kCapacity>
struct Lists {
  Tensors<kCapacity> first;
  const void* others[kOthers][kCapacity];

  // As that of Tensors: takes what fits from position `begin` of `count`, returns the one behind.
  int64_t fill(const Gradient* gradients, const void* const* const (&lists)[kOthers], int64_t begin,
               int64_t count) {
    first.fill(gradients + begin, gradients + count, false);
    for (int l = 0; l < kOthers; ++l) {
      for (int i = 0; i < first.size; ++i) others[l][i] = lists[l][begin + i];
    }
    return begin + first.size;
  }
  // What list l has at the place of a chunk of tensor t.
  template <class T>
  __device__ __forceinline__ const T* beside(int l, int t, int chunk) const {
    return static_cast<const T*>(others[l][t]) + int64_t{chunk - first.begin[t]} * kChunk;
  }
};

// Whether packets of two tensors lie alike.
__device__ __forceinline__ bool in_step(const void* x, const void* y) {
  return (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0;
}

// A packet as numbers.
template <class T>
struct Numbers {
  typename Element<T>::Compute x[Element<T>::kPacket];

  __device__ __forceinline__ explicit Numbers(const uint4& packet) {
    Element<T>::unpack(packet, x);
  }
};

// Walks a chunk by a block: calls packet(address in x, packets of the others ...) or, for what is
// no packet of all of them, single(position).
template <class T, class Packet, class Single, class... Others>
__device__ __forceinline__ void walk(const Span<T>& x, Packet&& packet, Single&& single,
                                     const Others*... others) {
  const int thread = static_cast<int>(threadIdx.x);
  if (!(in_step(x.data, others) && ...)) {
    for (int at = thread; at < x.count; at += kThreads) single(at);
    return;
  }
  const Pieces<Element<T>::kPacket> pieces(x);
  for (int group = thread; group < pieces.groups; group += kThreads) {
    const int at = pieces.group_at(group);
    packet(x.data + at, *reinterpret_cast<const uint4*>(others + at)...);
  }
  if (pieces.single(thread)) single(pieces.single_at(thread));
}

// Calls f(x[i], others[i] ...) for the elements of a chunk as numbers.
template <class T, class F, class... Others>
__device__ __forceinline__ void each_element(const Span<T>& x, F&& f, const Others*... others) {
  const auto numbers = [&](const auto&... packets) {
    MMBAL_UNROLL
    for (int i = 0; i < Element<T>::kPacket; ++i) f(packets.x[i]...);
  };
  walk(
      x,
      [&](const T* at, const auto&... packets) {
        numbers(Numbers<T>(*reinterpret_cast<const uint4*>(at)), Numbers<T>(packets)...);
      },
      [&](int at) { f(Element<T>::from(x.data[at]), Element<T>::from(others[at])...); }, others...);
}

// Sums over the block, to all threads.
template <int kSums>
__device__ __forceinline__ void block_sums(double (&sums)[kSums]) {
  __shared__ double of_warps[kWarps];
  MMBAL_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = block_sum(sums[i], of_warps);
}

// Adds up what the threads of all blocks have for the chunks of a tensor: by the last block, which
// returns true to its threads. `parts` has room for kSums of each chunk.
template <int kSums, int kCapacity>
__device__ __forceinline__ bool sum_over_chunks(const Tensors<kCapacity>& tensors, int chunk, int t,
                                                double* parts, uint32_t* counters,
                                                double (&sums)[kSums]) {
  const int begin = tensors.begin[t];
  const int total = tensors.chunks(t);
  block_sums(sums);
  if (total == 1) return true;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    MMBAL_UNROLL
    for (int i = 0; i < kSums; ++i) parts[kSums * int64_t{chunk} + i] = sums[i];
    last = last_to_arrive(counters + t, static_cast<uint32_t>(total));
  }
  __syncthreads();
  if (!last) return false;
  MMBAL_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    // Written by other blocks: past this multiprocessor's cache.
    MMBAL_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] += __ldcg(parts + kSums * int64_t{begin + c} + i);
  }
  block_sums(sums);
  return true;
}

}  // namespace
}  // namespace mmbal::cuda
