// Gradients pulled towards earlier weights: a block takes a chunk, the last block of a tensor adds
// up the squares.
#include "cuda/combine.h"
#include "math/pull.h"
#include "operations/pull.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity>
struct PullJob {
  Lists<2, kCapacity> lists;  // gradients; weights and anchors
  const float* coefficients;
  double* squares;     // [rows]
  double* parts;       // [chunks]
  uint32_t* counters;  // [tensors]
};
static_assert(sizeof(PullJob<kFewOf<2>>) <= 4096, "see kFew");

template <int kCapacity>
__global__ __launch_bounds__(kThreads,
                             4) void pull_kernel(const PullJob<kCapacity> __grid_constant__ job) {
  const Tensors<kCapacity>& tensors = job.lists.first;
  const int chunk = static_cast<int>(blockIdx.x);
  const int t = tensor_of_chunk(tensors, chunk);
  const float beta = job.coefficients[tensors.modality[t]];
  double squares[] = {0.0};
  with_type(static_cast<DType>(tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    using V = PolicyOf<T>;
    using F = typename V::F;
    const auto span =
        span_of_chunk<T>(tensors.data[t], tensors.count[t], 0, chunk - tensors.begin[t]);
    const auto square = [&](F y) { squares[0] += static_cast<double>(y) * static_cast<double>(y); };
    if (pulls(beta)) {
      const auto b = static_cast<F>(beta);
      combine(
          span, [&](F g, F theta, F anchor) { return pulled<V>(g, theta, anchor, b); }, square,
          job.lists.template beside<T>(0, t, chunk), job.lists.template beside<T>(1, t, chunk));
    } else {
      each_element(span, square);
    }
  });
  if (!sum_over_chunks(tensors, chunk, t, job.parts, job.counters, squares)) return;
  if (threadIdx.x == 0) job.squares[tensors.row[t]] = squares[0];
}

template <int kCapacity>
void pull_all(const Pull& args, const Cuda& cuda) {
  const Workspace workspace = Workspace::for_sums(cuda, chunks_of(args.gradients, args.count));
  PullJob<kCapacity> job;
  job.coefficients = args.coefficients;
  job.squares = args.squares;
  job.parts = workspace.sums;
  job.counters = workspace.tensor_counters;
  for (int64_t next = 0; next < args.count;) {
    next = job.lists.fill(args.gradients, {args.weights, args.anchors}, next, args.count);
    launch(pull_kernel<kCapacity>, dim3(static_cast<unsigned>(job.lists.first.chunks())), kThreads,
           cuda, job);
  }
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void pull(const Pull& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  (args.count <= cuda::kFewOf<2> ? cuda::pull_all<cuda::kFewOf<2>>
                                 : cuda::pull_all<cuda::kManyOf<2>>)(args, cuda);
}

}  // namespace mmbal
