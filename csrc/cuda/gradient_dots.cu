// Dots of pairs of gradients: a block takes a chunk, the last block of a pair adds them up.
#include "cuda/kernels.h"
#include "operations/gradient_dots.h"

namespace mmbal::cuda {
namespace {

// Pairs of one launch, in two sizes for the reason that Tensors has.
constexpr int kManyPairs = 640;
constexpr int kFewPairs = 80;

template <int kCapacity>
struct Pairs {
  Tensors<kCapacity> first;
  const void* second[kCapacity];
  double* out;         // [rows, 3]
  double* parts;       // [chunks, 3]
  uint32_t* counters;  // [pairs]
};

template <class T>
__device__ __forceinline__ Dots dots_of(const Span<T>& x, const T* y) {
  constexpr int kPacket = Element<T>::kPacket;
  Dots sum{};
  const auto add_element = [&](int at) {
    add_products(Element<T>::from(x.data[at]), Element<T>::from(y[at]), &sum);
  };
  const int thread = static_cast<int>(threadIdx.x);
  const auto apart = reinterpret_cast<uintptr_t>(x.data) - reinterpret_cast<uintptr_t>(y);
  if (apart % 16 != 0) {
    for (int at = thread; at < x.count; at += kThreads) add_element(at);
    return sum;
  }
  const Pieces<kPacket> pieces(x);
  for (int group = thread; group < pieces.groups; group += kThreads) {
    typename Element<T>::Compute a[kPacket], b[kPacket];
    Element<T>::unpack(*reinterpret_cast<const uint4*>(x.data + pieces.group_at(group)), a);
    Element<T>::unpack(*reinterpret_cast<const uint4*>(y + pieces.group_at(group)), b);
    MMBAL_UNROLL
    for (int i = 0; i < kPacket; ++i) add_products(a[i], b[i], &sum);
  }
  if (pieces.single(thread)) add_element(pieces.single_at(thread));
  return sum;
}

// To all threads.
__device__ __forceinline__ Dots block_sum_of(const Dots& part) {
  __shared__ double sums[kWarps];
  const double first = block_sum(part.first, sums);
  const double both = block_sum(part.both, sums);
  return {first, both, block_sum(part.second, sums)};
}

__device__ __forceinline__ void write(const Dots& dots, double* row) {
  row[0] = dots.first;
  row[1] = dots.both;
  row[2] = dots.second;
}

template <int kCapacity>
__global__ __launch_bounds__(kThreads) void dots_kernel(
    const Pairs<kCapacity> __grid_constant__ job) {
  const int chunk = static_cast<int>(blockIdx.x);
  const int t = tensor_of_chunk(job.first, chunk);
  const int begin = job.first.begin[t];
  const int total = job.first.chunks(t);
  Dots part{};
  with_type(static_cast<DType>(job.first.dtype[t]), [&](auto type) {
    using T = decltype(type);
    const auto x = span_of_chunk<T>(job.first.data[t], job.first.count[t], 0, chunk - begin);
    const T* y = static_cast<const T*>(job.second[t]) + (chunk - begin) * kChunk;
    part = block_sum_of(dots_of(x, y));
  });
  double* row = job.out + 3 * int64_t{job.first.row[t]};
  __shared__ bool last;
  if (threadIdx.x == 0) {
    if (total == 1) {
      write(part, row);
      last = false;
    } else {
      write(part, job.parts + 3 * int64_t{chunk});
      last = last_to_arrive(job.counters + t, static_cast<uint32_t>(total));
    }
  }
  __syncthreads();
  if (!last) return;
  // Written by other blocks: past this multiprocessor's cache.
  Dots mine{};
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    const double* other = job.parts + 3 * int64_t{begin + c};
    add({__ldcg(other), __ldcg(other + 1), __ldcg(other + 2)}, &mine);
  }
  const Dots sum = block_sum_of(mine);
  if (threadIdx.x == 0) write(sum, row);
}

template <int kCapacity>
void dots_of_all(const GradientDots& args, const Cuda& cuda) {
  const Workspace workspace = Workspace::for_sums(cuda, 3 * chunks_of(args.first, args.count));
  const Gradient* end = args.first + args.count;
  const Gradient* second = args.second;
  Pairs<kCapacity> job;
  job.out = args.out;
  job.parts = workspace.sums;
  job.counters = workspace.tensor_counters;
  for (const Gradient* first = args.first; first != end;) {
    first = job.first.fill(first, end, false);
    for (int i = 0; i < job.first.size; ++i) job.second[i] = (second++)->data;
    launch(dots_kernel<kCapacity>, dim3(static_cast<unsigned>(job.first.chunks())), kThreads, cuda,
           job);
  }
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void gradient_dots(const GradientDots& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  (args.count <= cuda::kFewPairs ? cuda::dots_of_all<cuda::kFewPairs>
                                 : cuda::dots_of_all<cuda::kManyPairs>)(args, cuda);
}

}  // namespace mmbal
