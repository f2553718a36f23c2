// The update in a launch of its own, a block per chunk, after that of the moments.
#include "cuda/modulate.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity, bool kUnscales>
__global__ __launch_bounds__(kThreads, 4) void apply_kernel(
    const Application<kCapacity> __grid_constant__ a) {
  // Backwards: what was measured last is still in the second-level cache.
  const int chunk = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  apply_chunk<kUnscales>(a, chunk, tensor_of_chunk(a.tensors, chunk), [] {});
}

struct Counter {
  int64_t* value;
};

__global__ void advance_kernel(const Counter __grid_constant__ counter) { ++*counter.value; }

template <int kCapacity>
void modulate_all(const Modulation& modulation, const Cuda& cuda) {
  const Gradient* gradient = modulation.gradients;
  const Gradient* end = gradient + modulation.count;
  const Workspace workspace = Workspace::for_chunks(cuda, chunks_of(gradient, modulation.count));
  const bool measured = modulation.measures();
  Application<kCapacity> application;
  application.settings =
      settings_of(modulation, measured ? workspace.rows : modulation.moments, workspace);
  const auto apply =
      modulation.inverse_scale ? apply_kernel<kCapacity, true> : apply_kernel<kCapacity, false>;
  while (gradient != end) {
    gradient = application.tensors.fill(gradient, end, measured);
    application.settings.advance = gradient == end ? modulation.advance : nullptr;
    if (measured) {
      launch_moments(application.tensors, modulation.inverse_scale, workspace.rows, workspace,
                     cuda);
    }
    launch(apply, dim3(static_cast<unsigned>(application.tensors.chunks())), kThreads, cuda,
           application);
  }
}

void modulate_none(const Modulation& modulation, const Cuda& cuda) {
  if (modulation.advance) launch(advance_kernel, dim3(1), 1, cuda, Counter{modulation.advance});
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void modulate(const Modulation& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  const bool one = args.single_launch && args.measures();
  (args.count == 0            ? cuda::modulate_none
   : one                      ? cuda::modulate_in_one_launch
   : args.count <= cuda::kFew ? cuda::modulate_all<cuda::kFew>
                              : cuda::modulate_all<cuda::kMany>)(args, cuda);
}

}  // namespace mmbal
