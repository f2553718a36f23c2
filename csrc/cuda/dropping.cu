// Features dropped before a fusion: one launch for all modalities, and one for their gradients.
#include <algorithm>
#include <stdexcept>

#include "cuda/kernels.h"
#include "operations/dropping.h"

namespace mmbal::cuda {
namespace {

constexpr int kMaxModalities = 256;
constexpr int kMaxBlocks = 1024;      // that share one modality's rows
constexpr int64_t kWarpWidth = 1024;  // rows up to here belong to a warp, longer ones to a block

template <class Arguments>
struct Launch {
  const void* from[kMaxModalities];
  void* to[kMaxModalities];
  int64_t widths[kMaxModalities];
  uint8_t dtypes[kMaxModalities];
  Arguments args;  // but for the lists of the host
  uint32_t* block_counter;
};

// By the threads of a row.
template <int kLanes, class Arguments>
__device__ __forceinline__ void scale_row(const Launch<Arguments>& launch, int m, int64_t b,
                                          float factor) {
  with_type(static_cast<DType>(launch.dtypes[m]), [&](auto type) {
    using T = decltype(type);
    using A = typename Element<T>::Compute;
    const int64_t width = launch.widths[m];
    const T* from = static_cast<const T*>(launch.from[m]) + b * width;
    T* to = static_cast<T*>(launch.to[m]) + b * width;
    MMBAL_UNROLL_BY(1)
    for (int64_t c = threadIdx.x % kLanes; c < width; c += kLanes) {
      // Dropped whatever was there, NaN too.
      to[c] =
          Element<T>::to(factor == 0 ? A{0} : static_cast<A>(factor) * Element<T>::from(from[c]));
    }
  });
}

template <int kLanes>
__global__ __launch_bounds__(kThreads) void drop_kernel(
    const Launch<DropFeatures> __grid_constant__ launch) {
  constexpr int kRows = kThreads / kLanes;  // that a block writes at a time
  const DropFeatures& args = launch.args;
  const Dropping& dropping = args.dropping;
  const int64_t modalities = args.rows.modalities;
  const int64_t batch = args.rows.batch;
  const int m = static_cast<int>(blockIdx.y);
  __shared__ float q[kMaxModalities];
  __shared__ float factor;
  __shared__ bool last;
  for (int64_t j = threadIdx.x; j < modalities; j += kThreads) q[j] = dropping.probability(j);
  __syncthreads();
  if (threadIdx.x == 0) {
    double dropped = 0;
    double all = 0;
    for (int64_t j = 0; j < modalities; ++j) {
      dropped += static_cast<double>(launch.widths[j]) * q[j];
      all += static_cast<double>(launch.widths[j]);
    }
    factor = static_cast<float>(1 / (1 - (all > 0 ? dropped / all : 0)));
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t stride = int64_t{gridDim.x} * kRows;
  for (int64_t b = int64_t{blockIdx.x} * kRows + group; b < batch; b += stride) {
    const float mine = dropping.drops(m, b, q[m]) ? 0 : factor;
    scale_row<kLanes>(launch, m, b, mine);
    if (threadIdx.x % kLanes != 0) continue;
    args.factors[m * batch + b] = mine;
    if (m != 0) continue;
    bool any = mine != 0;
    for (int64_t j = 1; j < modalities && !any; ++j) any = !dropping.drops(j, b, q[j]);
    with_type(args.weight_dtype, [&](auto type) {
      using T = decltype(type);
      static_cast<T*>(args.weight)[b] = Element<T>::to(any ? 1 : 0);
    });
  }
  __syncthreads();
  if (threadIdx.x == 0) last = last_to_arrive(launch.block_counter, gridDim.x * gridDim.y);
  __syncthreads();
  if (!last) return;
  for (int64_t j = threadIdx.x; j < modalities; j += kThreads) args.probabilities[j] = q[j];
  if (threadIdx.x == 0 && args.advance) ++*args.advance;
}

template <int kLanes>
__global__ __launch_bounds__(kThreads) void drop_backward_kernel(
    const Launch<DropFeaturesBackward> __grid_constant__ launch) {
  constexpr int kRows = kThreads / kLanes;
  const int64_t batch = launch.args.rows.batch;
  const int m = static_cast<int>(blockIdx.y);
  const int64_t stride = int64_t{gridDim.x} * kRows;
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  for (int64_t b = int64_t{blockIdx.x} * kRows + group; b < batch; b += stride) {
    scale_row<kLanes>(launch, m, b, launch.args.factors[m * batch + b]);
  }
}

template <class Arguments>
void run(void (*warps)(const Launch<Arguments> __grid_constant__),
         void (*blocks)(const Launch<Arguments> __grid_constant__), const Arguments& args,
         uint32_t* block_counter, const Cuda& cuda) {
  const FeatureRows& rows = args.rows;
  if (rows.modalities > kMaxModalities) {
    throw std::runtime_error("drop_features: CUDA kernels take at most " +
                             std::to_string(kMaxModalities) + " modalities (got " +
                             std::to_string(rows.modalities) + ")");
  }
  Launch<Arguments> all;
  std::copy_n(rows.from, rows.modalities, all.from);
  std::copy_n(rows.to, rows.modalities, all.to);
  std::copy_n(rows.widths, rows.modalities, all.widths);
  for (int64_t m = 0; m < rows.modalities; ++m)
    all.dtypes[m] = static_cast<uint8_t>(rows.dtypes[m]);
  all.args = args;
  all.block_counter = block_counter;
  const int64_t widest = *std::max_element(rows.widths, rows.widths + rows.modalities);
  const bool narrow = widest <= kWarpWidth;
  const int64_t at_once = narrow ? kWarps : 1;
  const int64_t count = std::clamp<int64_t>((rows.batch + at_once - 1) / at_once, 1, kMaxBlocks);
  launch(narrow ? warps : blocks,
         dim3(static_cast<unsigned>(count), static_cast<unsigned>(rows.modalities)), kThreads, cuda,
         all);
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void drop_features(const DropFeatures& args, const Cuda& cuda) {
  using namespace cuda;
  const DeviceGuard guard(cuda.index);
  const Workspace workspace = Workspace::for_sums(cuda, 0);
  run<DropFeatures>(drop_kernel<32>, drop_kernel<kThreads>, args, workspace.block_counter, cuda);
}

template <>
void drop_features_backward(const DropFeaturesBackward& args, const Cuda& cuda) {
  using namespace cuda;
  const DeviceGuard guard(cuda.index);
  run<DropFeaturesBackward>(drop_backward_kernel<32>, drop_backward_kernel<kThreads>, args, nullptr,
                            cuda);
}

}  // namespace mmbal
