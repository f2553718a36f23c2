// Dots of pairs of gradients: a block takes a chunk, the last block of a pair adds them up.
#include "cuda/dots.h"
#include "operations/gradient_dots.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity>
struct DotsJob {
  Lists<1, kCapacity> lists;
  double* out;         // [rows, 3]
  double* parts;       // [chunks, 3]
  uint32_t* counters;  // [pairs]
};
static_assert(sizeof(DotsJob<kFewOf<1>>) <= 4096, "see kFew");

template <int kCapacity>
__global__ __launch_bounds__(kThreads,
                             4) void dots_kernel(const DotsJob<kCapacity> __grid_constant__ job) {
  const int chunk = static_cast<int>(blockIdx.x);
  const int t = tensor_of_chunk(job.lists.first, chunk);
  Dots dots{};
  if (!dots_of_tensor(job.lists, chunk, t, job.parts, job.counters, dots)) return;
  if (threadIdx.x != 0) return;
  double* row = job.out + 3 * int64_t{job.lists.first.row[t]};
  row[0] = dots.first;
  row[1] = dots.both;
  row[2] = dots.second;
}

template <int kCapacity>
void dots_of_all(const GradientDots& args, const Cuda& cuda) {
  const Workspace workspace = Workspace::for_sums(cuda, 3 * chunks_of(args.first, args.count));
  DotsJob<kCapacity> job;
  job.out = args.out;
  job.parts = workspace.sums;
  job.counters = workspace.tensor_counters;
  for (int64_t next = 0; next < args.count;) {
    next = job.lists.fill(args.first, {args.second}, next, args.count);
    launch(dots_kernel<kCapacity>, dim3(static_cast<unsigned>(job.lists.first.chunks())), kThreads,
           cuda, job);
  }
}

}  // namespace
}  // namespace mmbal::cuda

namespace mmbal {

template <>
void gradient_dots(const GradientDots& args, const Cuda& cuda) {
  const cuda::DeviceGuard guard(cuda.index);
  (args.count <= cuda::kFewOf<1> ? cuda::dots_of_all<cuda::kFewOf<1>>
                                 : cuda::dots_of_all<cuda::kManyOf<1>>)(args, cuda);
}

}  // namespace mmbal
