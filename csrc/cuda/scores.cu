// Softmax scores of all modalities over a batch, with the ratios and coefficients that follow, in
// one launch.
#include <algorithm>
#include <stdexcept>

#include "cuda/device.h"
#include "math/modulation.h"
#include "math/softmax.h"

namespace mmbal::cuda {
namespace {

constexpr int kMaxModalities = 256;
constexpr int kMaxBlocks = 256;         // that share one modality's rows
constexpr int64_t kWarpClasses = 1024;  // rows up to here belong to a warp, longer ones to a block
constexpr int kUnroll = 4;

struct Scoring {
  const void* logits[kMaxModalities];
  const void* soft[kMaxModalities];
  uint8_t dtypes[kMaxModalities];
  int64_t batch, classes;
  const int64_t* labels;  // or null: soft labels
  int64_t ignore_index;
  Derivation derivation;
  bool accumulate;
  int32_t* status;
  double* sums;  // [modalities, gridDim.x]
  uint32_t* block_counter;
};

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

template <int kLanes, class T>
__device__ __forceinline__ double row_score(const Scoring& s, int m, int64_t b) {
  using A = typename Element<T>::Compute;
  const T* row = static_cast<const T*>(s.logits[m]) + b * s.classes;
  if (s.labels == nullptr) {
    const T* weights = static_cast<const T*>(s.soft[m]) + b * s.classes;
    const Softmax<A> all = combine<kLanes>(read_row<kLanes>(row, weights, s.classes));
    return static_cast<double>(all.weighted) / static_cast<double>(all.sum);
  }
  const int64_t label = s.labels[b];
  if (label < 0 || label >= s.classes) {
    if (label != s.ignore_index && s.status && threadIdx.x % kLanes == 0) {
      atomicOr(s.status, kLabelOutOfRange);
    }
    return 0;
  }
  const Softmax<A> all =
      combine<kLanes>(read_row<kLanes>(row, static_cast<const T*>(nullptr), s.classes));
  const A own = exponential(Element<T>::from(row[label]) - all.top);
  return static_cast<double>(own) / static_cast<double>(all.sum);
}

// By one block.
__device__ __forceinline__ void derive_all(const Derivation& d) {
  float* ratios = d.state + d.modalities;
  float* coefficients = ratios + d.modalities;
  for (int64_t m = threadIdx.x; m < d.modalities; m += kThreads) {
    if (d.ratios) ratios[m] = discrepancy_ratio(d.state, d.modalities, m);
    if (d.rule != Rule::kNone) {
      coefficients[m] = modulation_coefficient(ratios[m], d.alpha, d.rule);
    }
  }
}

// Scores from the sums of the blocks: a warp per modality.
__device__ __forceinline__ void finish(const Scoring& s) {
  for (int m = static_cast<int>(threadIdx.x) / 32; m < s.derivation.modalities; m += kWarps) {
    double sum = 0;
    for (unsigned b = threadIdx.x % 32; b < gridDim.x; b += 32) {
      sum += __ldcg(s.sums + int64_t{m} * gridDim.x + b);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      float& score = s.derivation.state[m];
      score = (s.accumulate ? score : 0.0f) + static_cast<float>(sum);
    }
  }
  __syncthreads();
  derive_all(s.derivation);
}

template <int kLanes>
__global__ __launch_bounds__(kThreads) void scores_kernel(const Scoring __grid_constant__ s) {
  constexpr int kRows = kThreads / kLanes;  // that a block reads at a time
  const int m = static_cast<int>(blockIdx.y);
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  __shared__ double sums[kRows];
  __shared__ bool last;
  double sum = 0;
  with_type(static_cast<DType>(s.dtypes[m]), [&](auto type) {
    const int64_t stride = int64_t{gridDim.x} * kRows;
    for (int64_t b = int64_t{blockIdx.x} * kRows + group; b < s.batch; b += stride) {
      sum += row_score<kLanes, decltype(type)>(s, m, b);
    }
  });
  if (threadIdx.x % kLanes == 0) sums[group] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int row = 1; row < kRows; ++row) sum += sums[row];
    s.sums[int64_t{m} * gridDim.x + blockIdx.x] = sum;
    last = last_to_arrive(s.block_counter, gridDim.x * gridDim.y);
  }
  __syncthreads();
  if (last) finish(s);
}

__global__ __launch_bounds__(kThreads) void derive_kernel(const Derivation __grid_constant__ d) {
  derive_all(d);
}

int64_t blocks_of(int64_t batch, int64_t rows) {
  return std::clamp<int64_t>((batch + rows - 1) / rows, 1, kMaxBlocks);
}

}  // namespace

int64_t scores_workspace_bytes(int64_t modalities, int64_t batch) {
  return Workspace::bytes_for_sums(modalities * blocks_of(batch, 1));
}

void scores(const Scores& scores, const Queue& queue) {
  if (scores.modalities > kMaxModalities) {
    throw std::runtime_error("contribution_scores: CUDA kernels take at most " +
                             std::to_string(kMaxModalities) + " modalities (got " +
                             std::to_string(scores.modalities) + ")");
  }
  const DeviceGuard guard(queue.device);
  const Workspace workspace(queue.workspace);
  Scoring scoring;
  for (int64_t m = 0; m < scores.modalities; ++m) {
    scoring.logits[m] = scores.logits[m];
    scoring.soft[m] = scores.soft ? scores.soft[m] : nullptr;
    scoring.dtypes[m] = static_cast<uint8_t>(scores.dtypes[m]);
  }
  scoring.batch = scores.batch;
  scoring.classes = scores.classes;
  scoring.labels = scores.labels;
  scoring.ignore_index = scores.ignore_index;
  scoring.derivation = {scores.state, scores.modalities, true, scores.alpha, scores.rule};
  scoring.accumulate = scores.accumulate;
  scoring.status = scores.status;
  scoring.sums = workspace.sums;
  scoring.block_counter = workspace.block_counter;
  const bool warps = scores.classes <= kWarpClasses;
  const int64_t blocks = blocks_of(scores.batch, warps ? kWarps : 1);
  launch(warps ? scores_kernel<32> : scores_kernel<kThreads>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(scores.modalities)), kThreads,
         queue, scoring);
}

void derive(const Derivation& derivation, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  launch(derive_kernel, dim3(1), kThreads, queue, derivation);
}

}  // namespace mmbal::cuda
