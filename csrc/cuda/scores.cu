// Softmax scores of all modalities over a batch, with the ratios and coefficients that follow, in
// one launch.
#include <algorithm>
#include <stdexcept>

#include "cuda/softmax.h"
#include "operations/scores.h"

namespace mmbal::cuda {
namespace {

constexpr int kMaxModalities = 256;
constexpr int kMaxBlocks = 256;  // that share one modality's rows

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

struct Fraction {
  double numerator, denominator;
};

// Score of row b, which has a label or soft labels.
template <int kLanes, class T>
__device__ __forceinline__ Fraction row_score(const Scoring& s, int m, int64_t b, int64_t label) {
  using A = typename Element<T>::Compute;
  const T* row = static_cast<const T*>(s.logits[m]) + b * s.classes;
  const T* weights = s.labels ? nullptr : static_cast<const T*>(s.soft[m]) + b * s.classes;
  const Softmax<A> all = combine<kLanes>(read_row<kLanes>(row, weights, s.classes));
  const A own = weights ? all.weighted : exponential(Element<T>::from(row[label]) - all.top);
  return {static_cast<double>(own), static_cast<double>(all.sum)};
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
__global__ __launch_bounds__(kThreads, 2) void scores_kernel(const Scoring __grid_constant__ s) {
  constexpr int kRows = kThreads / kLanes;  // that a block reads at a time
  const int m = static_cast<int>(blockIdx.y);
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  __shared__ double sums[kRows];
  __shared__ bool last;
  double sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kRows;
  for (int64_t b = int64_t{blockIdx.x} * kRows + group; b < s.batch; b += stride) {
    int64_t label = 0;
    if (s.labels) {
      label = s.labels[b];
      if (label == s.ignore_index) continue;
      if (label < 0 || label >= s.classes) {
        if (s.status) atomicOr(s.status, kLabelOutOfRange);
        continue;
      }
    }
    Fraction score{};
    with_type(static_cast<DType>(s.dtypes[m]),
              [&](auto type) { score = row_score<kLanes, decltype(type)>(s, m, b, label); });
    sum += score.numerator / score.denominator;
  }
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

Scoring scoring_of(const Scores& scores, const Workspace& workspace) {
  if (scores.modalities > kMaxModalities) {
    throw std::runtime_error("contribution_scores: CUDA kernels take at most " +
                             std::to_string(kMaxModalities) + " modalities (got " +
                             std::to_string(scores.modalities) + ")");
  }
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
  return scoring;
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void score(const Scores& args, const Cuda& cuda) {
  using namespace cuda;
  const DeviceGuard guard(cuda.index);
  const Workspace workspace = Workspace::for_sums(cuda, args.modalities * blocks_of(args.batch, 1));
  const bool warps = args.classes <= kWarpClasses;
  const int64_t blocks = blocks_of(args.batch, warps ? kWarps : 1);
  launch(warps ? scores_kernel<32> : scores_kernel<kThreads>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.modalities)), kThreads,
         cuda, scoring_of(args, workspace));
}

template <>
void derive(const Derivation& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  cuda::launch(cuda::derive_kernel, dim3(1), cuda::kThreads, cuda, args);
}

}  // namespace mmbal
