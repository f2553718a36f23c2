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
void modulate_all(const Gradient* gradient, const Gradient* end, const Modulation& modulation,
                  const Queue& queue) {
  const Workspace workspace(queue.workspace);
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
                     queue);
    }
    launch(apply, dim3(static_cast<unsigned>(application.tensors.chunks())), kThreads, queue,
           application);
  }
}

}  // namespace

void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation,
              const Queue& queue) {
  const DeviceGuard guard(queue.device);
  if (count > 0) {
    const bool one = modulation.single_launch && modulation.measures();
    (one             ? modulate_in_one_launch
     : count <= kFew ? modulate_all<kFew>
                     : modulate_all<kMany>)(gradients, gradients + count, modulation, queue);
  } else if (modulation.advance) {
    launch(advance_kernel, dim3(1), 1, queue, Counter{modulation.advance});
  }
}

}  // namespace mmbal::cuda
