// The softmax of a row of logits, read once by a warp or by a block.
#pragma once

#include "cuda/kernels.h"
#include "math/softmax.h"

namespace mmbal::cuda {
namespace {

constexpr int64_t kWarpClasses = 1024;  // rows up to here belong to a warp, longer ones to a block
constexpr int kUnroll = 4;

__device__ __forceinline__ float exponential(float x) { return exp_nonpositive<Scalar>(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float lowest(float) { return -3.402823466e38f; }
__device__ __forceinline__ double lowest(double) { return -1.7976931348623157e308; }
__device__ __forceinline__ float infinity(float) { return HUGE_VALF; }
__device__ __forceinline__ double infinity(double) { return HUGE_VAL; }

template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return a > b ? a : b;
}

// A thread's part of one softmax: sums of exp(x - top), as such and weighted.
template <class A>
struct Softmax {
  A top, sum, weighted;

  __device__ __forceinline__ void rescale(A new_top) {
    const A factor = exponential(top - new_top);
    sum *= factor;
    weighted *= factor;
    top = new_top;
  }
};

// One pass over a row; kLanes threads share it, and each of them takes every kLanes-th logit.
template <int kLanes, class T>
__device__ __forceinline__ Softmax<typename Element<T>::Compute> read_row(const T* row,
                                                                          const T* weights,
                                                                          int64_t classes) {
  using A = typename Element<T>::Compute;
  // A finite start, so that a logit of -inf is no special case.
  Softmax<A> part{lowest(A{}), 0, 0};
  for (int64_t c = threadIdx.x % kLanes; c < classes; c += kUnroll * kLanes) {
    A x[kUnroll];
    MMBAL_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = c + i * kLanes;
      x[i] = at < classes ? Element<T>::from(row[at]) : -infinity(A{});
    }
    const A top = larger(larger(x[0], x[1]), larger(x[2], x[3]));
    if (top > part.top) part.rescale(top);
    MMBAL_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = c + i * kLanes;
      const A e = exponential(x[i] - part.top);
      part.sum += e;
      if (weights && at < classes) part.weighted += e * Element<T>::from(weights[at]);
    }
  }
  return part;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
  MMBAL_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) x = larger(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Sum over the threads of a row, for all of them.
template <int kLanes, class A>
__device__ __forceinline__ A row_sum(A x) {
  __shared__ A shared[kWarps];
  return kLanes == kThreads ? block_sum(x, shared) : warp_sum(x);
}

// The softmax of the whole row, for all its threads.
template <int kLanes, class A>
__device__ __forceinline__ Softmax<A> combine(Softmax<A> part) {
  __shared__ A shared[kWarps];
  A top = warp_max(part.top);
  if (kLanes == kThreads) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = top;
    __syncthreads();
    MMBAL_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) top = larger(top, shared[warp]);
  }
  part.rescale(top);
  part.sum = kLanes == kThreads ? block_sum(part.sum, shared) : warp_sum(part.sum);
  part.weighted = kLanes == kThreads ? block_sum(part.weighted, shared) : warp_sum(part.weighted);
  return part;
}

}  // namespace
}  // namespace mmbal::cuda
