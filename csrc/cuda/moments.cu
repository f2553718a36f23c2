// Moments of gradients: a block measures a chunk, the last block of a tensor merges them.
#include "cuda/moments.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity>
struct Measurement {
  Tensors<kCapacity> tensors;
  const float* inverse_scale;  // may be null
  double* out;                 // [rows, 3]
  Partial* partials;           // [chunks]
  uint32_t* counters;          // [tensors]
};

template <int kCapacity, bool kUnscales>
__global__ __launch_bounds__(kThreads, 4) void moments_kernel(
    const Measurement<kCapacity> __grid_constant__ job) {
  const int chunk = static_cast<int>(blockIdx.x);
  measure_chunk<kUnscales>(job.tensors, chunk, tensor_of_chunk(job.tensors, chunk),
                           job.inverse_scale, job.partials, job.counters, job.out, last_to_arrive);
}

}  // namespace

template <int kCapacity>
void launch_moments(const Tensors<kCapacity>& tensors, const float* inverse_scale, double* out,
                    const Workspace& workspace, const Queue& queue) {
  const Measurement<kCapacity> job{tensors, inverse_scale, out, workspace.partials,
                                   workspace.tensor_counters};
  launch(inverse_scale ? moments_kernel<kCapacity, true> : moments_kernel<kCapacity, false>,
         dim3(static_cast<unsigned>(tensors.chunks())), kThreads, queue, job);
}

template void launch_moments(const Tensors<kFew>&, const float*, double*, const Workspace&,
                             const Queue&);
template void launch_moments(const Tensors<kMany>&, const float*, double*, const Workspace&,
                             const Queue&);

namespace {

template <int kCapacity>
void measure_all(const Gradient* gradient, const Gradient* end, double* out, const Queue& queue) {
  const Workspace workspace(queue.workspace);
  Tensors<kCapacity> tensors;
  while (gradient != end) {
    gradient = tensors.fill(gradient, end, false);
    launch_moments(tensors, nullptr, out, workspace, queue);
  }
}

}  // namespace

void moments(const Gradient* gradients, int64_t count, double* out, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  (count <= kFew ? measure_all<kFew> : measure_all<kMany>)(gradients, gradients + count, out,
                                                           queue);
}

}  // namespace mmbal::cuda
