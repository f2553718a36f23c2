// The noise alone, and Philox itself for the published known answers.
#include <stdexcept>

#include "cuda/noise.h"

namespace mmbal::cuda {
namespace {

struct Target {
  void* data;
  int64_t count;
  int64_t offset;
  DType dtype;
  uint32_t id;
  NoiseSource source;
};

template <class T>
__device__ __forceinline__ void fill(const Span<T>& span, const NoiseKey& key) {
  using Compute = typename Element<T>::Compute;
  const Pieces<kGroup<T>> pieces(span);
  const bool in_step = ((span.index + static_cast<uint64_t>(pieces.head)) & 3) == 0;
  MMBAL_UNROLL_BY(1)
  for (int group = static_cast<int>(threadIdx.x); group < pieces.groups; group += kThreads) {
    const int at = pieces.group_at(group);
    float z[kGroup<T>];
    if (in_step) {
      noise_of_blocks<kGroup<T>>(key, (span.index + static_cast<uint64_t>(at)) >> 2, z);
    } else {
      noise_across_blocks<kGroup<T>>(key, span.index + static_cast<uint64_t>(at), z);
    }
    Group<T> values{};
    values.transform([&](int i, Compute) { return static_cast<Compute>(z[i]); });
    values.store(span.data + at);
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces.single(thread)) {
    const int at = pieces.single_at(thread);
    span.data[at] = Element<T>::to(noise_of_element(key, span.index + static_cast<uint64_t>(at)));
  }
}

__global__ __launch_bounds__(kThreads) void noise_kernel(const Target __grid_constant__ target) {
  with_type(target.dtype, [&](auto type) {
    fill(span_of_chunk<decltype(type)>(target.data, target.count, target.offset, blockIdx.x),
         noise_key(target.source, target.id));
  });
}

struct PhiloxInput {
  uint32_t counter[4];
  uint32_t key[2];
  int rounds;
  uint32_t* words;
};

__global__ void philox_kernel(const PhiloxInput __grid_constant__ input) {
  const Words<uint32_t> counter{input.counter[0], input.counter[1], input.counter[2],
                                input.counter[3]};
  const auto words = input.rounds == 7 ? philox4x32<Scalar, 7>(counter, input.key[0], input.key[1])
                                       : philox4x32<Scalar>(counter, input.key[0], input.key[1]);
  input.words[0] = words.w0;
  input.words[1] = words.w1;
  input.words[2] = words.w2;
  input.words[3] = words.w3;
}

}  // namespace

void noise(const Gradient& tensor, const NoiseSource& source, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  launch(noise_kernel, dim3(static_cast<unsigned>(chunks_of(tensor.count))), kThreads, queue,
         Target{tensor.data, tensor.count, tensor.offset, tensor.dtype, tensor.id, source});
}

void philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]) {
  PhiloxInput input{
      {counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]}, rounds, nullptr};
  check(cudaMalloc(&input.words, 4 * sizeof(uint32_t)), "cudaMalloc");
  cudaError_t error = cudaErrorUnknown;
  try {
    launch(philox_kernel, dim3(1), 1, Queue{0, nullptr, nullptr}, input);
    error = cudaMemcpy(words, input.words, 4 * sizeof(uint32_t), cudaMemcpyDeviceToHost);
  } catch (...) {
    cudaFree(input.words);
    throw;
  }
  cudaFree(input.words);
  check(error, "cudaMemcpy");
}

}  // namespace mmbal::cuda
