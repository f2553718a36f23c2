// Cross-entropies of several heads for one target, and their weighted sum: one launch for the
// losses, one for the gradients.
#include <algorithm>
#include <stdexcept>

#include "cuda/softmax.h"
#include "math/cross_entropy.h"
#include "operations/cross_entropy.h"

namespace mmbal::cuda {
namespace {

constexpr int kMaxHeads = 256;
constexpr int kMaxBlocks = 256;  // that share one head's rows

struct Blending {
  const void* logits[kMaxHeads];
  uint8_t dtypes[kMaxHeads];
  CrossEntropy args;  // but for the lists of the host
  const void* grad;   // this and the next: backward only
  void* grads[kMaxHeads];
  bool wide;
  double* sums;  // [heads + 1, gridDim.x]; the last row counts
  uint32_t* block_counter;

  __device__ __forceinline__ bool counted(int64_t row) const {
    return args.labels == nullptr || args.labels[row] != args.ignore_index;
  }
  __device__ __forceinline__ bool in_range(int64_t row) const {
    return args.labels == nullptr || (args.labels[row] >= 0 && args.labels[row] < args.classes);
  }
  template <class T>
  __device__ __forceinline__ const T* row(int head, int64_t row) const {
    return static_cast<const T*>(logits[head]) + row * args.classes;
  }
  template <class A>
  __device__ __forceinline__ const A* soft_row(int64_t row) const {
    return args.soft ? static_cast<const A*>(args.soft) + row * args.classes : nullptr;
  }
  template <class A>
  __device__ __forceinline__ A& top(int head, int64_t row) const {
    return static_cast<A*>(args.normalizers)[head * args.rows + row];
  }
  template <class A>
  __device__ __forceinline__ A& log_sum(int head, int64_t row) const {
    return static_cast<A*>(args.normalizers)[(args.heads + head) * args.rows + row];
  }
  __device__ __forceinline__ void write(void* out, int64_t i, double value) const {
    if (wide) {
      static_cast<double*>(out)[i] = value;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(value);
    }
  }
};

template <int kLanes, class T>
__device__ __forceinline__ double loss_of_row(const Blending& blending, int head, int64_t r) {
  using A = typename Element<T>::Compute;
  const CrossEntropy& args = blending.args;
  const bool first = threadIdx.x % kLanes == 0;
  if (!blending.counted(r) || !blending.in_range(r)) {
    if (first) blending.top<A>(head, r) = blending.log_sum<A>(head, r) = 0;
    return blending.counted(r) ? static_cast<double>(NAN) : 0.0;
  }
  const T* row = blending.row<T>(head, r);
  const Softmax<A> all =
      combine<kLanes>(read_row<kLanes>(row, static_cast<const T*>(nullptr), args.classes));
  const A log_sum = log(all.sum);
  const A* soft = blending.soft_row<A>(r);
  RowSums<A> sums{1, 0, 0};
  if (soft || args.smoothing > 0) {
    A mass = 0;
    for (int64_t c = threadIdx.x % kLanes; c < args.classes; c += kLanes) {
      const A d = Element<T>::from(row[c]) - all.top;
      sums.all += d;
      if (soft) {
        mass += soft[c];
        sums.own += soft[c] * d;
      }
    }
    sums.all = row_sum<kLanes>(sums.all);
    if (soft) {
      sums.own = row_sum<kLanes>(sums.own);
      sums.mass = row_sum<kLanes>(mass);
    }
  }
  if (soft == nullptr) sums.own = Element<T>::from(row[args.labels[r]]) - all.top;
  if (first) {
    blending.top<A>(head, r) = all.top;
    blending.log_sum<A>(head, r) = log_sum;
  }
  return static_cast<double>(
      row_loss(log_sum, sums, static_cast<A>(args.smoothing), static_cast<A>(args.classes)));
}

// Means and their weighted sum from the sums of the blocks.
__device__ __forceinline__ void finish(const Blending& blending) {
  __shared__ double totals[kMaxHeads + 1];
  const CrossEntropy& args = blending.args;
  for (int k = static_cast<int>(threadIdx.x) / 32; k <= args.heads; k += kWarps) {
    double sum = 0;
    for (unsigned b = threadIdx.x % 32; b < gridDim.x; b += 32) {
      sum += __ldcg(blending.sums + int64_t{k} * gridDim.x + b);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) totals[k] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double count = totals[args.heads];
  double loss = 0;
  for (int k = 0; k < args.heads; ++k) {
    const double mean = totals[k] / count;
    blending.write(args.losses, k, mean);
    if (args.weights[k] != 0) loss += args.weights[k] * mean;
  }
  blending.write(args.loss, 0, loss);
  *args.count = static_cast<int64_t>(count);
}

template <int kLanes>
__global__ __launch_bounds__(kThreads,
                             2) void loss_kernel(const Blending __grid_constant__ blending) {
  constexpr int kRows = kThreads / kLanes;  // that a block reads at a time
  const int head = static_cast<int>(blockIdx.y);
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  __shared__ double sums[kRows];
  __shared__ double counts[kRows];
  __shared__ bool last;
  double sum = 0;
  double count = 0;
  with_type(static_cast<DType>(blending.dtypes[head]), [&](auto type) {
    const int64_t stride = int64_t{gridDim.x} * kRows;
    for (int64_t r = int64_t{blockIdx.x} * kRows + group; r < blending.args.rows; r += stride) {
      sum += loss_of_row<kLanes, decltype(type)>(blending, head, r);
      count += blending.counted(r) ? 1 : 0;
    }
  });
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
    blending.sums[int64_t{head} * gridDim.x + blockIdx.x] = sum;
    if (head == 0) blending.sums[blending.args.heads * gridDim.x + blockIdx.x] = count;
    last = last_to_arrive(blending.block_counter, gridDim.x * gridDim.y);
  }
  __syncthreads();
  if (last) finish(blending);
}

template <int kLanes, class T>
__device__ __forceinline__ void gradient_of_row(const Blending& blending, int head, int64_t r,
                                                double scale) {
  using A = typename Element<T>::Compute;
  const CrossEntropy& args = blending.args;
  const T* row = blending.row<T>(head, r);
  T* out = static_cast<T*>(blending.grads[head]) + r * args.classes;
  const int64_t begin = threadIdx.x % kLanes;
  const bool counted = blending.counted(r) && args.weights[head] != 0;
  if (!counted || !blending.in_range(r)) {
    const T value = Element<T>::to(counted ? static_cast<A>(NAN) : A{0});
    for (int64_t c = begin; c < args.classes; c += kLanes) out[c] = value;
    return;
  }
  const A* soft = blending.soft_row<A>(r);
  A mass = 1;
  if (soft) {
    mass = 0;
    for (int64_t c = begin; c < args.classes; c += kLanes) mass += soft[c];
    mass = row_sum<kLanes>(mass);
  }
  const RowGradient<A> gradient(static_cast<A>(scale), mass, static_cast<A>(args.smoothing),
                                static_cast<A>(args.classes));
  const A top = blending.top<A>(head, r);
  const A log_sum = blending.log_sum<A>(head, r);
  const int64_t label = soft ? -1 : args.labels[r];
  for (int64_t c = begin; c < args.classes; c += kLanes) {
    const A softmax = exponential(Element<T>::from(row[c]) - top - log_sum);
    A g = gradient.softmax * softmax - gradient.uniform;
    if (soft) g -= gradient.label * soft[c];
    if (c == label) g -= gradient.label;
    out[c] = Element<T>::to(g);
  }
}

template <int kLanes>
__global__ __launch_bounds__(kThreads,
                             2) void gradient_kernel(const Blending __grid_constant__ blending) {
  constexpr int kRows = kThreads / kLanes;
  const int head = static_cast<int>(blockIdx.y);
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  const CrossEntropy& args = blending.args;
  const double grad = blending.wide
                          ? *static_cast<const double*>(blending.grad)
                          : static_cast<double>(*static_cast<const float*>(blending.grad));
  const double scale = grad * args.weights[head] / static_cast<double>(*args.count);
  with_type(static_cast<DType>(blending.dtypes[head]), [&](auto type) {
    const int64_t stride = int64_t{gridDim.x} * kRows;
    for (int64_t r = int64_t{blockIdx.x} * kRows + group; r < args.rows; r += stride) {
      gradient_of_row<kLanes, decltype(type)>(blending, head, r, scale);
    }
  });
}

int64_t blocks_of(int64_t all, int64_t rows) {
  return std::clamp<int64_t>((all + rows - 1) / rows, 1, kMaxBlocks);
}

Blending blending_of(const CrossEntropy& args) {
  if (args.heads > kMaxHeads) {
    throw std::runtime_error("blended_cross_entropy: CUDA kernels take at most " +
                             std::to_string(kMaxHeads) + " heads (got " +
                             std::to_string(args.heads) + ")");
  }
  Blending blending{};
  for (int64_t k = 0; k < args.heads; ++k) {
    blending.logits[k] = args.logits[k];
    blending.dtypes[k] = static_cast<uint8_t>(args.dtypes[k]);
  }
  blending.args = args;
  blending.wide = args.wide();
  return blending;
}

void launch_rows(void (*warps)(const Blending __grid_constant__),
                 void (*blocks)(const Blending __grid_constant__), const Blending& blending,
                 const Cuda& cuda) {
  const CrossEntropy& args = blending.args;
  const bool short_rows = args.classes <= kWarpClasses;
  const dim3 grid(static_cast<unsigned>(blocks_of(args.rows, short_rows ? kWarps : 1)),
                  static_cast<unsigned>(args.heads));
  launch(short_rows ? warps : blocks, grid, kThreads, cuda, blending);
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void cross_entropy(const CrossEntropy& args, const Cuda& cuda) {
  using namespace cuda;
  const DeviceGuard guard(cuda.index);
  const Workspace workspace = Workspace::for_sums(cuda, (args.heads + 1) * blocks_of(args.rows, 1));
  Blending blending = blending_of(args);
  blending.sums = workspace.sums;
  blending.block_counter = workspace.block_counter;
  launch_rows(loss_kernel<32>, loss_kernel<kThreads>, blending, cuda);
}

template <>
void cross_entropy_backward(const CrossEntropyBackward& args, const Cuda& cuda) {
  using namespace cuda;
  const DeviceGuard guard(cuda.index);
  Blending blending = blending_of(args);
  blending.grad = args.grad;
  std::copy_n(args.grads, args.heads, blending.grads);
  launch_rows(gradient_kernel<32>, gradient_kernel<kThreads>, blending, cuda);
}

}  // namespace mmbal
