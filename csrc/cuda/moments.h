// Moments of a chunk from registers, with one read of memory, and of a tensor from its chunks.
#pragma once

#include "cuda/kernels.h"
#include "math/moments.h"

namespace mmbal::cuda {
namespace {

// A thread's elements of a chunk, held in registers or read from the first-level cache each time.
template <class T, bool kInRegisters, bool kUnscales>
class Values {
 public:
  using Compute = typename Element<T>::Compute;

  __device__ __forceinline__ Values(const Span<T>& span, Unscaling<T, kUnscales> unscaling)
      : data_(span.data), pieces_(span), unscaling_(unscaling) {
    const int thread = static_cast<int>(threadIdx.x);
    MMBAL_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      if (thread + j * kThreads < pieces_.groups) packets_[j] = load(j);
    }
    if (pieces_.single(thread)) single_ = element(pieces_.single_at(thread));
  }

  __device__ __forceinline__ Compute element(int at) const {
    return Element<T>::from(unscaled(data_[at]));
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const int thread = static_cast<int>(threadIdx.x);
    MMBAL_UNROLL
    for (int j = 0; j < kPackets; ++j) {
      if (thread + j * kThreads < pieces_.groups) {
        Compute x[kPacket];
        Element<T>::unpack(j < kHeld ? packets_[j] : load(j), x);
        MMBAL_UNROLL
        for (int i = 0; i < kPacket; ++i) f(x[i]);
      }
    }
    if (pieces_.single(thread)) f(single_);
  }

 private:
  static constexpr int kPacket = Element<T>::kPacket;
  static constexpr int kPackets = kChunk / kThreads / kPacket;
  static constexpr int kHeld = kInRegisters ? kPackets : 1;

  template <class Elements>
  __device__ __forceinline__ Elements unscaled(const Elements& elements) const {
    Unscaling<T, kUnscales> unscaling = unscaling_;  // what it finds, the update finds too
    return unscaling(elements);
  }
  __device__ __forceinline__ uint4 load(int j) const {
    const int at = pieces_.group_at(static_cast<int>(threadIdx.x) + j * kThreads);
    return unscaled(*reinterpret_cast<const uint4*>(data_ + at));
  }

  const T* data_;
  Pieces<kPacket> pieces_;
  Unscaling<T, kUnscales> unscaling_;
  uint4 packets_[kHeld] = {};  // GCC does not see that what is not loaded is not used
  Compute single_;
};

// What partial_from_shifted makes a Partial of.
struct Shifted {
  double pivot, sum, squares;
};

// Thread 0's result is the chunk's; returns whether it can be trusted, to all threads. A: the type
// to add up in.
template <class A, class Values>
__device__ __forceinline__ bool measure_in(const Values& values, int count, Shifted& result) {
  __shared__ A sums[kWarps];
  __shared__ A squares_of_warps[kWarps];
  // What float32 has no range for is measured in float64.
  constexpr A kUnit = sizeof(A) == 8 ? static_cast<A>(kSumUnit) : A{1};
  A sum = 0;
  values.each([&](A x) { sum += kUnit * x; });
  const A pivot = block_sum(sum, sums) / (kUnit * static_cast<A>(count));
  A shifted = 0;
  A squares = 0;
  values.each([&](A x) {
    const A d = x - pivot;
    shifted += kUnit * d;
    squares = fma(d, d, squares);
  });
  shifted = warp_sum(shifted);
  squares = warp_sum(squares);
  __syncthreads();  // all have read the pivot
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = shifted;
    squares_of_warps[threadIdx.x / 32] = squares;
  }
  __syncthreads();
  int out_of_range = 0;
  if (threadIdx.x == 0) {
    result = {pivot, 0, 0};
    for (int warp = 0; warp < kWarps; ++warp) {
      result.sum += sums[warp];
      result.squares += squares_of_warps[warp];
    }
    result.sum /= kUnit;
    out_of_range = sizeof(A) == 4 && squares_out_of_range(result.squares, count);
  }
  return sizeof(A) == 8 || !__syncthreads_or(out_of_range);
}

template <bool kUnscales, class T>
__device__ __forceinline__ Shifted measure(const Span<T>& span, const float* inverse_scale) {
  using Compute = typename Element<T>::Compute;
  const Unscaling<T, kUnscales> unscaling(inverse_scale);
  Shifted result{};
  if (sizeof(T) < 8) {
    const Values<T, true, kUnscales> values(span, unscaling);
    if (measure_in<float>(values, span.count, result)) return result;
  }
  // Doubles, and what float32 has no range for: rare enough to give it no registers.
  const Values<T, false, kUnscales> values(span, unscaling);
  const Compute first = values.element(0);
  bool same = first - first == 0;
  values.each([&](Compute x) { same &= x == first; });
  if (__syncthreads_and(same)) return {first, 0, 0};
  measure_in<double>(values, span.count, result);
  return result;
}

// As mmbal::merge, by all threads of a block.
__device__ __forceinline__ void merge_chunks(const Partial* chunks, int total, int64_t count,
                                             double* out) {
  __shared__ double sums[kWarps];
  // Written by other blocks: past this multiprocessor's cache.
  const auto load = [&](int c) {
    const double2 chunk = __ldcg(reinterpret_cast<const double2*>(chunks + c));
    return Partial{chunk.x, chunk.y};
  };
  double sum = 0;
  MMBAL_UNROLL_BY(4)
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    sum += load(c).mean * (kSumUnit * chunk_size(count, c));
  }
  const double mean = block_sum(sum, sums) / (kSumUnit * static_cast<double>(count));
  double m2 = 0;
  MMBAL_UNROLL_BY(4)
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    m2 += m2_about(load(c), mean, chunk_size(count, c));
  }
  m2 = block_sum(m2, sums);
  if (threadIdx.x == 0) {
    out[0] = static_cast<double>(count);
    out[1] = mean;
    out[2] = m2;
  }
}

// Measures a chunk of tensor t, by one block. The block whose thread 0 is told by
// is_last(counter, chunks of t) that all other chunks of t are there merges them to its row of
// `out`; returns whether it did, to all threads.
template <bool kUnscales, int kCapacity, class IsLast>
__device__ __forceinline__ bool measure_chunk(const Tensors<kCapacity>& tensors, int chunk, int t,
                                              const float* inverse_scale, Partial* partials,
                                              uint32_t* counters, double* out, IsLast&& is_last) {
  const int begin = tensors.begin[t];
  const int total = tensors.chunks(t);
  const int64_t count = tensors.count[t];
  Shifted shifted{};
  with_type(static_cast<DType>(tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    const auto span = span_of_chunk<T>(tensors.data[t], count, 0, chunk - begin);
    shifted = measure<kUnscales>(span, inverse_scale);
  });
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partials[chunk] = partial_from_shifted(shifted.pivot, shifted.sum, shifted.squares,
                                           chunk_size(count, chunk - begin));
    last = total == 1 || is_last(counters + t, static_cast<uint32_t>(total));
  }
  __syncthreads();
  if (last) merge_chunks(partials + begin, total, count, out + 3 * int64_t{tensors.row[t]});
  return last;
}

}  // namespace
}  // namespace mmbal::cuda
