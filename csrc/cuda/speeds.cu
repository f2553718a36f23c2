// The last few additions of the conditional learning speed, after its moments: one block.
#include <stdexcept>

#include "cuda/kernels.h"
#include "math/speed.h"
#include "operations/speeds.h"

namespace mmbal::cuda {
namespace {

constexpr int kMaxGroups = 1024;

__global__ __launch_bounds__(kThreads) void speeds_kernel(const Speeds __grid_constant__ s) {
  __shared__ double ratios[kMaxGroups];
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  int broken = 0;
  for (int64_t g = threadIdx.x / 32; g < s.groups; g += kWarps) {
    const double* members = s.membership + g * s.tensors;
    const double weights = warp_sum(group_norm(s.moments, members, s.tensors, lane, 32));
    const double gradients =
        warp_sum(group_norm(s.moments + 3 * s.tensors, members, s.tensors, lane, 32));
    const double ratio = gradients / weights;
    broken |= !is_finite(ratio);
    if (lane == 0) ratios[g] = ratio;
  }
  const bool finite = !__syncthreads_or(broken);
  if (threadIdx.x == 0) *s.finite = finite;
  if (!finite || (s.active && !*s.active)) return;
  for (int64_t g = threadIdx.x; g < s.groups; g += kThreads) s.totals[g] += ratios[g];
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void accumulate_speeds(const Speeds& args, const Cuda& cuda) {
  if (args.groups > cuda::kMaxGroups) {
    throw std::runtime_error("learning speed: CUDA kernels take at most " +
                             std::to_string(cuda::kMaxGroups) + " groups (got " +
                             std::to_string(args.groups) + ")");
  }
  const cuda::DeviceGuard guard(cuda.index);
  cuda::launch(cuda::speeds_kernel, dim3(1), cuda::kThreads, cuda, args);
}

}  // namespace mmbal
