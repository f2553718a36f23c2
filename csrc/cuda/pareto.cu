// MMPareto's combination. The first launch measures the dots of each pair, a block to a chunk, and
// its last block derives how each is combined; the second one writes.
#include "cuda/combine.h"
#include "cuda/dots.h"
#include "operations/pareto.h"

namespace mmbal::cuda {
namespace {

// Of one pair; in the workspace, because lists longer than a launch share one derivation.
struct PairState {
  Dots dots;
  double modality;
  Combination by;
};

template <int kCapacity>
struct ParetoJob {
  Lists<1, kCapacity> lists;
  PairState* pairs;     // of this launch's lists
  double* parts;        // [chunks, 3]
  const double* given;  // [rows, 3] dots, or null: measured
  uint32_t* counters;   // [pairs]
  uint32_t* block_counter;
  PairState* first;  // of all pairs
  int64_t count;     // of all pairs in the launch that derives, else 0
  int64_t modalities;
  double gamma;
  const float* scale;
  double* out;
};
static_assert(sizeof(ParetoJob<kFewOf<1>>) <= 4096, "see kFew");

__device__ __forceinline__ Dots load_dots(const PairState& pair) {
  // Written by other blocks: past this multiprocessor's cache.
  return {__ldcg(&pair.dots.first), __ldcg(&pair.dots.both), __ldcg(&pair.dots.second)};
}

// By one block, once the dots of all pairs are there.
__device__ __forceinline__ void derive_combinations(PairState* pairs, int64_t count,
                                                    int64_t modalities, double gamma,
                                                    const float* scale, double* out) {
  const double inverse = scale ? 1.0 / *scale : 1.0;
  double* weights = out + modalities;
  for (int64_t m = 0; m < modalities; ++m) {
    Dots mine{};
    for (int64_t p = threadIdx.x; p < count; p += kThreads) {
      if (__ldcg(&pairs[p].modality) == static_cast<double>(m)) {
        add(dots_of_losses(load_dots(pairs[p]), inverse), &mine);
      }
    }
    double sums[] = {mine.first, mine.both, mine.second};
    block_sums(sums);
    if (threadIdx.x == 0) {
      const Dots sum{sums[0], sums[1], sums[2]};
      out[m] = cosine(sum);
      weights[m] = weight_of_fused(sum, out[m]);
    }
  }
  __syncthreads();
  for (int64_t p = threadIdx.x; p < count; p += kThreads) {
    const double weight = weights[static_cast<int64_t>(__ldcg(&pairs[p].modality))];
    pairs[p].by = combination(load_dots(pairs[p]), weight, gamma, inverse);
  }
}

// kGiven: a block to a pair, else to a chunk.
template <bool kGiven, int kCapacity>
__global__ __launch_bounds__(kThreads, 4) void derive_kernel(
    const ParetoJob<kCapacity> __grid_constant__ job) {
  const Tensors<kCapacity>& tensors = job.lists.first;
  const int block = static_cast<int>(blockIdx.x);
  const int t = kGiven ? block : tensor_of_chunk(tensors, block);
  Dots dots{};
  if (kGiven) {
    const double* row = job.given + 3 * int64_t{tensors.row[t]};
    dots = {row[0], row[1], row[2]};
  }
  const bool whole = kGiven || dots_of_tensor(job.lists, block, t, job.parts, job.counters, dots);
  if (whole && threadIdx.x == 0) {
    job.pairs[t].dots = dots;
    job.pairs[t].modality = tensors.modality[t];
  }
  if (job.count == 0) return;
  __shared__ bool last;
  if (threadIdx.x == 0) last = last_to_arrive(job.block_counter, gridDim.x);
  __syncthreads();
  if (!last) return;
  derive_combinations(job.first, job.count, job.modalities, job.gamma, job.scale, job.out);
}

template <int kCapacity>
__global__ __launch_bounds__(kThreads, 4) void combine_kernel(
    const ParetoJob<kCapacity> __grid_constant__ job) {
  const Tensors<kCapacity>& tensors = job.lists.first;
  const int chunk = static_cast<int>(blockIdx.x);
  const int t = tensor_of_chunk(tensors, chunk);
  const Combination by = job.pairs[t].by;
  if (by.scale == 1 && by.share == 0) return;
  with_type(static_cast<DType>(tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    using V = PolicyOf<T>;
    using F = typename V::F;
    const auto span =
        span_of_chunk<T>(tensors.data[t], tensors.count[t], 0, chunk - tensors.begin[t]);
    const auto scale = static_cast<F>(by.scale);
    const auto share = static_cast<F>(by.share);
    // Without a share the other gradient need not be read.
    const T* own = by.share == 0 ? span.data : job.lists.template beside<T>(0, t, chunk);
    combine(span, [&](F g, F x) { return combined<V>(g, x, scale, share); }, [](F) {}, own);
  });
}

template <int kCapacity>
void combine_all(const Pareto& args, const Cuda& cuda) {
  constexpr auto kDoubles = static_cast<int64_t>(sizeof(PairState) / sizeof(double));
  const bool given = args.dots != nullptr;
  const int64_t chunks = given ? 0 : chunks_of(args.gradients, args.count);
  const Workspace workspace = Workspace::for_sums(cuda, kDoubles * args.count + 3 * chunks);
  auto* pairs = reinterpret_cast<PairState*>(workspace.sums);
  ParetoJob<kCapacity> job;
  job.parts = workspace.sums + kDoubles * args.count;
  job.given = args.dots;
  job.counters = workspace.tensor_counters;
  job.block_counter = workspace.block_counter;
  job.first = pairs;
  job.modalities = args.modalities;
  job.gamma = args.gamma;
  job.scale = args.scale;
  job.out = args.out;
  const auto each_launch = [&](auto&& run) {
    for (int64_t begin = 0, end = 0; begin < args.count; begin = end) {
      end = job.lists.fill(args.gradients, {args.own}, begin, args.count);
      job.pairs = pairs + begin;
      job.count = end == args.count ? args.count : 0;
      run();
    }
  };
  const auto blocks = [](int32_t count) { return dim3(static_cast<unsigned>(count)); };
  each_launch([&] {
    const Tensors<kCapacity>& tensors = job.lists.first;
    if (given) {
      launch(derive_kernel<true, kCapacity>, blocks(tensors.size), kThreads, cuda, job);
    } else {
      launch(derive_kernel<false, kCapacity>, blocks(tensors.chunks()), kThreads, cuda, job);
    }
  });
  each_launch([&] {
    launch(combine_kernel<kCapacity>, blocks(job.lists.first.chunks()), kThreads, cuda, job);
  });
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void pareto(const Pareto& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  (args.count <= cuda::kFewOf<1> ? cuda::combine_all<cuda::kFewOf<1>>
                                 : cuda::combine_all<cuda::kManyOf<1>>)(args, cuda);
}

}  // namespace mmbal
