// Moments of gradients: one read of memory. A block measures a chunk from registers; the last block
// of a tensor merges the tensor's chunks.
#include "cuda/device.h"
#include "math/moments.h"

namespace mmbal::cuda {
namespace {

template <int kCapacity>
struct Measurement {
  Tensors<kCapacity> tensors;
  double* out;         // [rows, 3]
  Partial* partials;   // [chunks]
  uint32_t* counters;  // [tensors]
};

// A thread's elements of a chunk, held in registers or read from the first-level cache each time.
template <class T, bool kInRegisters>
class Values {
 public:
  using Compute = typename Element<T>::Compute;

  __device__ __forceinline__ explicit Values(const Span<T>& span)
      : data_(span.data), pieces_(span) {
    const int thread = static_cast<int>(threadIdx.x);
    MMBAL_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      if (thread + j * kThreads < pieces_.groups) packets_[j] = load(j);
    }
    if (pieces_.single(thread)) single_ = Element<T>::from(span.data[pieces_.single_at(thread)]);
  }

  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const int thread = static_cast<int>(threadIdx.x);
    MMBAL_UNROLL
    for (int j = 0; j < kPackets; ++j) {
      if (thread + j * kThreads < pieces_.groups) {
        Compute x[kPacket];
        Element<T>::unpack(j < kHeld ? packets_[j] : load(j), x);
        MMBAL_UNROLL
        for (int i = 0; i < kPacket; ++i) f(x[i]);
      }
    }
    if (pieces_.single(thread)) f(single_);
  }

 private:
  static constexpr int kPacket = Element<T>::kPacket;
  static constexpr int kPackets = kChunk / kThreads / kPacket;
  static constexpr int kHeld = kInRegisters ? kPackets : 1;

  __device__ __forceinline__ uint4 load(int j) const {
    const int at = pieces_.group_at(static_cast<int>(threadIdx.x) + j * kThreads);
    return *reinterpret_cast<const uint4*>(data_ + at);
  }

  const T* data_;
  Pieces<kPacket> pieces_;
  uint4 packets_[kHeld];
  Compute single_;
};

// What partial_from_shifted makes a Partial of.
struct Shifted {
  double pivot, sum, squares;
};

// Thread 0's result is the chunk's; returns whether it can be trusted, to all threads. A: the type
// to add up in.
template <class A, class Values>
__device__ __forceinline__ bool measure_in(const Values& values, int count, Shifted& result) {
  __shared__ A sums[kWarps];
  __shared__ A squares_of_warps[kWarps];
  A sum = 0;
  values.each([&](A x) { sum += x; });
  const A pivot = block_sum(sum, sums) / static_cast<A>(count);
  A shifted = 0;
  A squares = 0;
  values.each([&](A x) {
    const A d = x - pivot;
    shifted += d;
    squares = fma(d, d, squares);
  });
  shifted = warp_sum(shifted);
  squares = warp_sum(squares);
  __syncthreads();  // all have read the pivot
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = shifted;
    squares_of_warps[threadIdx.x / 32] = squares;
  }
  __syncthreads();
  int out_of_range = 0;
  if (threadIdx.x == 0) {
    result = {pivot, 0, 0};
    for (int warp = 0; warp < kWarps; ++warp) {
      result.sum += sums[warp];
      result.squares += squares_of_warps[warp];
    }
    out_of_range = sizeof(A) == 4 && squares_out_of_range(result.squares, count);
  }
  return sizeof(A) == 8 || !__syncthreads_or(out_of_range);
}

template <class T>
__device__ __forceinline__ Shifted measure(const Span<T>& span) {
  using Compute = typename Element<T>::Compute;
  Shifted result{};
  if (sizeof(T) < 8) {
    const Values<T, true> values(span);
    if (measure_in<float>(values, span.count, result)) return result;
  }
  // Doubles, and what float32 has no range for: rare enough to give it no registers.
  const Values<T, false> values(span);
  const Compute first = Element<T>::from(span.data[0]);
  bool same = first - first == 0;
  values.each([&](Compute x) { same &= x == first; });
  if (__syncthreads_and(same)) return {first, 0, 0};
  measure_in<double>(values, span.count, result);
  return result;
}

// As mmbal::merge, by all threads of a block.
__device__ __forceinline__ void merge_chunks(const Partial* chunks, int total, int64_t count,
                                             double* out) {
  __shared__ double sums[kWarps];
  // Written by other blocks: past this multiprocessor's cache.
  const auto load = [&](int c) {
    const double2 chunk = __ldcg(reinterpret_cast<const double2*>(chunks + c));
    return Partial{chunk.x, chunk.y};
  };
  double sum = 0;
  MMBAL_UNROLL_BY(4)
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    sum += load(c).mean * chunk_size(count, c);
  }
  const double mean = block_sum(sum, sums) / static_cast<double>(count);
  double m2 = 0;
  MMBAL_UNROLL_BY(4)
  for (int c = static_cast<int>(threadIdx.x); c < total; c += kThreads) {
    m2 += m2_about(load(c), mean, chunk_size(count, c));
  }
  m2 = block_sum(m2, sums);
  if (threadIdx.x == 0) {
    out[0] = static_cast<double>(count);
    out[1] = mean;
    out[2] = m2;
  }
}

template <int kCapacity>
__global__ __launch_bounds__(kThreads, 4) void moments_kernel(
    const Measurement<kCapacity> __grid_constant__ job) {
  const int chunk = static_cast<int>(blockIdx.x);
  const int t = tensor_of_chunk(job.tensors, chunk);
  const int begin = job.tensors.begin[t];
  const int total = job.tensors.begin[t + 1] - begin;
  const int64_t count = job.tensors.count[t];
  Shifted shifted{};
  with_type(static_cast<DType>(job.tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    shifted = measure(span_of_chunk<T>(job.tensors.data[t], count, 0, chunk - begin));
  });
  __shared__ bool last;
  if (threadIdx.x == 0) {
    job.partials[chunk] = partial_from_shifted(shifted.pivot, shifted.sum, shifted.squares,
                                               chunk_size(count, chunk - begin));
    last = total == 1 || last_to_arrive(job.counters + t, static_cast<uint32_t>(total));
  }
  __syncthreads();
  if (!last) return;
  merge_chunks(job.partials + begin, total, count, job.out + 3 * int64_t{job.tensors.row[t]});
}

}  // namespace

template <int kCapacity>
void launch_moments(const Tensors<kCapacity>& tensors, double* out, const Workspace& workspace,
                    const Queue& queue) {
  const Measurement<kCapacity> job{tensors, out, workspace.partials, workspace.tensor_counters};
  launch(moments_kernel<kCapacity>, dim3(static_cast<unsigned>(tensors.chunks())), kThreads, queue,
         job);
}

template void launch_moments(const Tensors<kFew>&, double*, const Workspace&, const Queue&);
template void launch_moments(const Tensors<kMany>&, double*, const Workspace&, const Queue&);

namespace {

template <int kCapacity>
void measure_all(const Gradient* gradient, const Gradient* end, double* out, const Queue& queue) {
  const Workspace workspace(queue.workspace);
  Tensors<kCapacity> tensors;
  while (gradient != end) {
    gradient = tensors.fill(gradient, end, false);
    launch_moments(tensors, out, workspace, queue);
  }
}

}  // namespace

void moments(const Gradient* gradients, int64_t count, double* out, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  (count <= kFew ? measure_all<kFew> : measure_all<kMany>)(gradients, gradients + count, out,
                                                           queue);
}

}  // namespace mmbal::cuda
