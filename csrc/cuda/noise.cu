// The noise alone, and Philox itself for the published known answers.
#include <algorithm>

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

void run_philox(const PhiloxBlock& block, uint32_t* words) {
  PhiloxInput input{{}, {block.key[0], block.key[1]}, block.rounds, words};
  std::copy_n(block.counter, 4, input.counter);
  launch(philox_kernel, dim3(1), 1, Cuda{}, input);
  check(cudaMemcpy(block.words, words, 4 * sizeof(uint32_t), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void fill_with_noise(const Noise& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  const Gradient& tensor = args.target;
  cuda::launch(
      cuda::noise_kernel, dim3(static_cast<unsigned>(cuda::chunks_of(tensor.count))),
      cuda::kThreads, cuda,
      cuda::Target{tensor.data, tensor.count, tensor.offset, tensor.dtype, tensor.id, args.source});
}

template <>
void philox(const PhiloxBlock& block, const Cuda&) {
  uint32_t* words = nullptr;
  cuda::check(cudaMalloc(&words, 4 * sizeof(uint32_t)), "cudaMalloc");
  try {
    cuda::run_philox(block, words);
  } catch (...) {
    cudaFree(words);
    throw;
  }
  cudaFree(words);
}

}  // namespace mmbal
