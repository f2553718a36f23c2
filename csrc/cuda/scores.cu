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
  Scores args;   // but for the lists of the host
  double* sums;  // [modalities + 1, gridDim.x]; the last row counts
  uint32_t* block_counter;
};

// A row of one modality, which has a label or soft labels.
template <class T>
struct Row {
  using A = typename Element<T>::Compute;
  const T* x;
  const T* q;
  int64_t classes, label;

  __device__ __forceinline__ A logit(int64_t c) const { return Element<T>::from(x[c]); }
  __device__ __forceinline__ A weight(int64_t c) const { return Element<T>::from(q[c]); }
};

// The likeliest class under soft labels, of equal ones the first; every thread looks itself.
template <class T>
__device__ __forceinline__ int64_t likeliest(const Row<T>& row) {
  int64_t best = 0;
  for (int64_t c = 1; c < row.classes; ++c) {
    if (row.weight(c) > row.weight(best)) best = c;
  }
  return best;
}

// Whether a label is the likeliest class, of equal ones the first. Not in a row with NaN.
template <int kLanes, class T>
__device__ __forceinline__ double accuracy(const Row<T>& row) {
  using A = typename Row<T>::A;
  const int64_t label = row.q ? likeliest(row) : row.label;
  const A own = row.logit(label);
  A others = own == own ? 0 : 1;  // that are as likely
  for (int64_t c = threadIdx.x % kLanes; c < row.classes; c += kLanes) {
    const A x = row.logit(c);
    if (c < label ? !(x < own) : !(x <= own)) others += 1;
  }
  return row_sum<kLanes>(others) == 0 ? 1 : 0;
}

template <int kLanes, class T>
__device__ __forceinline__ double softmax_score(const Row<T>& row, Statistic statistic) {
  using A = typename Row<T>::A;
  const Softmax<A> all = combine<kLanes>(read_row<kLanes>(row.x, row.q, row.classes));
  if (statistic == Statistic::kProbability) {
    const A own = row.q ? all.weighted : exponential(row.logit(row.label) - all.top);
    return static_cast<double>(own) / static_cast<double>(all.sum);
  }
  const double log_sum = log(static_cast<double>(all.sum));
  if (row.q == nullptr) {
    return floored(static_cast<double>(row.logit(row.label) - all.top) - log_sum);
  }
  const A rest = static_cast<A>(log_sum);
  A logs = 0;
  for (int64_t c = threadIdx.x % kLanes; c < row.classes; c += kLanes) {
    logs += static_cast<A>(floored(row.logit(c) - all.top - rest)) * row.weight(c);
  }
  return row_sum<kLanes>(logs);
}

__device__ __forceinline__ void sigmoids_of(float x, float& up, float& down) {
  sigmoids<Scalar>(x, up, down);
}
__device__ __forceinline__ void sigmoids_of(double x, double& up, double& down) {
  up = 1 / (1 + exp(-x));
  down = 1 / (1 + exp(x));
}

// Labels that are each of one class: the mean over the classes.
template <int kLanes, class T>
__device__ __forceinline__ double multi_label_score(const Row<T>& row, Statistic statistic) {
  using A = typename Row<T>::A;
  A sum = 0;
  for (int64_t c = threadIdx.x % kLanes; c < row.classes; c += kLanes) {
    const A x = row.logit(c);
    const A q = row.weight(c);
    if (statistic == Statistic::kAccuracy) {
      if (x == x && (x > 0) == (q > static_cast<A>(0.5))) sum += 1;
      continue;
    }
    A up, down;
    sigmoids_of(x, up, down);
    if (statistic == Statistic::kLogProbability) {
      up = static_cast<A>(floored(log(static_cast<double>(up))));
      down = static_cast<A>(floored(log(static_cast<double>(down))));
    }
    sum += q * up + (1 - q) * down;
  }
  return static_cast<double>(row_sum<kLanes>(sum)) / static_cast<double>(row.classes);
}

template <int kLanes, class T>
__device__ __forceinline__ double row_score(const Scoring& s, int m, int64_t b, int64_t label) {
  const Scores& args = s.args;
  const int64_t at = b * args.classes;
  const Row<T> row{static_cast<const T*>(s.logits[m]) + at,
                   args.labels ? nullptr : static_cast<const T*>(s.soft[m]) + at, args.classes,
                   label};
  if (args.multi_label) return multi_label_score<kLanes>(row, args.statistic);
  if (args.statistic == Statistic::kAccuracy) return accuracy<kLanes>(row);
  return softmax_score<kLanes>(row, args.statistic);
}

// By one block.
__device__ __forceinline__ void derive_all(const Derivation& d) {
  const int64_t count = d.modalities;
  float* ratios = d.state + count;
  float* coefficients = ratios + count;
  if (d.totals) {
    for (int64_t m = threadIdx.x; m < count; m += kThreads)
      d.state[m] = d.totals[m] / d.totals[count];
    __syncthreads();
  }
  const Balance balance = d.balance();
  for (int64_t m = threadIdx.x; m < count; m += kThreads) {
    if (d.ratios) ratios[m] = ratio(balance, m);
    if (d.rule != Rule::kNone) coefficients[m] = coefficient(balance, m, ratios[m]);
  }
}

// Scores from the sums of the blocks: a warp per modality, and one for the number of samples.
__device__ __forceinline__ void finish(const Scoring& s) {
  const Scores& args = s.args;
  const int64_t rows = args.derivation.modalities + (args.derivation.totals ? 1 : 0);
  for (int64_t m = threadIdx.x / 32; m < rows; m += kWarps) {
    double sum = 0;
    for (unsigned b = threadIdx.x % 32; b < gridDim.x; b += 32) {
      sum += __ldcg(s.sums + m * gridDim.x + b);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      float& total = args.sums[m];
      total = (args.accumulate ? total : 0.0f) + static_cast<float>(sum);
    }
  }
  __syncthreads();
  derive_all(args.derivation);
}

template <int kLanes>
__global__ __launch_bounds__(kThreads, 2) void scores_kernel(const Scoring __grid_constant__ s) {
  constexpr int kRows = kThreads / kLanes;  // that a block reads at a time
  const Scores& args = s.args;
  const int m = static_cast<int>(blockIdx.y);
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  __shared__ double sums[kRows];
  __shared__ double counts[kRows];
  __shared__ bool last;
  double sum = 0;
  double count = 0;
  const int64_t stride = int64_t{gridDim.x} * kRows;
  for (int64_t b = int64_t{blockIdx.x} * kRows + group; b < args.batch; b += stride) {
    int64_t label = 0;
    if (args.labels) {
      label = args.labels[b];
      if (label == args.ignore_index) continue;
      if (label < 0 || label >= args.classes) {
        if (args.status) atomicOr(args.status, kLabelOutOfRange);
        continue;
      }
    }
    with_type(static_cast<DType>(s.dtypes[m]),
              [&](auto type) { sum += row_score<kLanes, decltype(type)>(s, m, b, label); });
    count += 1;
  }
  if (threadIdx.x % kLanes == 0) {
    sums[group] = sum;
    counts[group] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int row = 1; row < kRows; ++row) {
      sum += sums[row];
      count += counts[row];
    }
    s.sums[int64_t{m} * gridDim.x + blockIdx.x] = sum;
    if (m == 0) s.sums[args.derivation.modalities * gridDim.x + blockIdx.x] = count;
    last = last_to_arrive(s.block_counter, gridDim.x * gridDim.y);
  }
  __syncthreads();
  if (last) finish(s);
}

__global__ __launch_bounds__(kThreads) void derive_kernel(const Derivation __grid_constant__ d) {
  derive_all(d);
}

__global__ __launch_bounds__(kThreads) void remember_kernel(const Memory __grid_constant__ memory) {
  const bool takes = memory.takes();
  if (takes) {
    for (int64_t m = threadIdx.x; m < memory.modalities; m += kThreads) memory.take(m);
  }
  __syncthreads();
  if (takes && threadIdx.x == 0) ++*memory.steps;
}

int64_t blocks_of(int64_t batch, int64_t rows) {
  return std::clamp<int64_t>((batch + rows - 1) / rows, 1, kMaxBlocks);
}

Scoring scoring_of(const Scores& scores, const Workspace& workspace) {
  const int64_t modalities = scores.derivation.modalities;
  if (modalities > kMaxModalities) {
    throw std::runtime_error("contribution_scores: CUDA kernels take at most " +
                             std::to_string(kMaxModalities) + " modalities (got " +
                             std::to_string(modalities) + ")");
  }
  Scoring scoring;
  for (int64_t m = 0; m < modalities; ++m) {
    scoring.logits[m] = scores.logits[m];
    scoring.soft[m] = scores.soft ? scores.soft[m] : nullptr;
    scoring.dtypes[m] = static_cast<uint8_t>(scores.dtypes[m]);
  }
  scoring.args = scores;
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
  const int64_t modalities = args.derivation.modalities;
  const Workspace workspace =
      Workspace::for_sums(cuda, (modalities + 1) * blocks_of(args.batch, 1));
  const bool warps = args.classes <= kWarpClasses;
  const int64_t blocks = blocks_of(args.batch, warps ? kWarps : 1);
  launch(warps ? scores_kernel<32> : scores_kernel<kThreads>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(modalities)), kThreads, cuda,
         scoring_of(args, workspace));
}

template <>
void derive(const Derivation& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  cuda::launch(cuda::derive_kernel, dim3(1), cuda::kThreads, cuda, args);
}

template <>
void remember(const Memory& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  cuda::launch(cuda::remember_kernel, dim3(1), cuda::kThreads, cuda, args);
}

}  // namespace mmbal
