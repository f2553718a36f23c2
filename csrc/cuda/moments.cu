// Moments of gradients: a block measures a chunk, the last block of a tensor merges them.
#include "cuda/moments.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity>
struct Measuring {
  Tensors<kCapacity> tensors;
  const float* inverse_scale;  // may be null
  double* out;                 // [rows, 3]
  Partial* partials;           // [chunks]
  uint32_t* counters;          // [tensors]
};

template <int kCapacity, bool kUnscales>
__global__ __launch_bounds__(kThreads, 4) void moments_kernel(
    const Measuring<kCapacity> __grid_constant__ job) {
  const int chunk = static_cast<int>(blockIdx.x);
  measure_chunk<kUnscales>(job.tensors, chunk, tensor_of_chunk(job.tensors, chunk),
                           job.inverse_scale, job.partials, job.counters, job.out, last_to_arrive);
}

}  // namespace

template <int kCapacity>
void launch_moments(const Tensors<kCapacity>& tensors, const float* inverse_scale, double* out,
                    const Workspace& workspace, const Cuda& cuda) {
  const Measuring<kCapacity> job{tensors, inverse_scale, out, workspace.partials,
                                 workspace.tensor_counters};
  launch(inverse_scale ? moments_kernel<kCapacity, true> : moments_kernel<kCapacity, false>,
         dim3(static_cast<unsigned>(tensors.chunks())), kThreads, cuda, job);
}

template void launch_moments(const Tensors<kFew>&, const float*, double*, const Workspace&,
                             const Cuda&);
template void launch_moments(const Tensors<kMany>&, const float*, double*, const Workspace&,
                             const Cuda&);

namespace {

template <int kCapacity>
void measure_all(const Measurement& args, const Cuda& cuda) {
  const Workspace workspace = Workspace::for_chunks(cuda, chunks_of(args.gradients, args.count));
  const Gradient* gradient = args.gradients;
  const Gradient* end = gradient + args.count;
  Tensors<kCapacity> tensors;
  while (gradient != end) {
    gradient = tensors.fill(gradient, end, false);
    launch_moments(tensors, nullptr, args.out, workspace, cuda);
  }
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void measure(const Measurement& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  (args.count <= cuda::kFew ? cuda::measure_all<cuda::kFew> : cuda::measure_all<cuda::kMany>)(args,
                                                                                              cuda);
}

}  // namespace mmbal
