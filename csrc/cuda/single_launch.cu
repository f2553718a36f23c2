// Moments and update in one launch. Blocks take tickets, and the order of the tickets is that of
// the data through the second-level cache: a wave of tensors is measured, the next one too, then
// the first is updated while the cache still holds it. One read and one write of memory, not two
// and one.
#include "cuda/modulate.h"
#include "cuda/moments.h"

namespace mmbal::cuda {
namespace {

// Three waves are in use at a time, and a cache in two halves may hold what both read twice.
constexpr int kWavesInCache = 8;

template <int kCapacity>
constexpr int kMaxWaves = kCapacity == kFew ? 16 : 64;  // of a launch: what its parameters hold

struct Work {
  int chunk;
  bool measures;  // else it updates
};

template <int kCapacity>
struct Pass {
  Application<kCapacity> application;
  double* rows;        // [tensors, 3] moments
  Partial* partials;   // [chunks]
  uint32_t* counters;  // [tensors]
  uint32_t* ticket;
  uint16_t waves;
  uint16_t first[kMaxWaves<kCapacity> + 1];  // tensor of each wave; last: how many tensors

  // Takes the first gradients of [gradient, end) that fit and returns the one behind them. A wave
  // is one tensor, or several that have at most `most_bytes`.
  const Gradient* fill(const Gradient* gradient, const Gradient* end, int64_t most_bytes) {
    Tensors<kCapacity>& tensors = application.tensors;
    tensors.fill(gradient, end, true);
    waves = 0;
    int64_t bytes = 0;
    for (int t = 0; t < tensors.size; ++t) {
      const int64_t more = gradient[t].count * size_of(gradient[t].dtype);
      bytes += more;
      if (t > 0 && bytes <= most_bytes) continue;
      if (waves == kMaxWaves<kCapacity>) {
        tensors.size = t;
        break;
      }
      first[waves++] = static_cast<uint16_t>(t);
      bytes = more;
    }
    first[waves] = static_cast<uint16_t>(tensors.size);
    return gradient + tensors.size;
  }

  // Chunks before a wave.
  __device__ __forceinline__ uint32_t begin(int wave) const {
    const int t = first[wave < 0 ? 0 : wave < waves ? wave : waves];
    return static_cast<uint32_t>(application.tensors.begin[t]);
  }
  // Tickets before those that measure a wave: they measured all waves before and updated all but
  // the last of these. One wave more than there are has nothing to measure.
  __device__ __forceinline__ uint32_t start(int wave) const {
    return begin(wave) + begin(wave - 1);
  }
  __device__ __forceinline__ Work work(uint32_t ticket) const {
    int wave = 0;
    for (int end = waves + 1; end - wave > 1;) {
      const int middle = (wave + end) / 2;
      (start(middle) <= ticket ? wave : end) = middle;
    }
    const uint32_t at = ticket - start(wave);
    const uint32_t measured = begin(wave + 1) - begin(wave);
    if (at < measured) return {static_cast<int>(begin(wave) + at), true};
    // The wave before, backwards: what was measured last is the likeliest to be in cache.
    return {static_cast<int>(begin(wave) - 1 - (at - measured)), false};
  }
};
static_assert(sizeof(Pass<kFew>) <= 4096, "see kFew");

// A block that updates a tensor waits for the blocks that measure it. They have lower tickets, and
// a ticket is taken by a block that already runs; blocks that measure wait for nobody. So however
// few blocks run at a time, the one with the lowest ticket gets on.
//
// A tensor's counter goes from 0 over its n chunks as they are measured, to n + 1 when its moments
// are there, on with every block that has seen this, and back to 0 with the last.
template <int kCapacity, bool kUnscales>
__global__ __launch_bounds__(kThreads, 4) void single_launch_kernel(
    const Pass<kCapacity> __grid_constant__ pass) {
  const Tensors<kCapacity>& tensors = pass.application.tensors;
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) {
    ticket = atomicAdd(pass.ticket, 1u);
    if (ticket == 2 * static_cast<uint32_t>(tensors.chunks()) - 1) *pass.ticket = 0;  // the last
  }
  __syncthreads();
  const Work work = pass.work(ticket);
  const int t = tensor_of_chunk(tensors, work.chunk);
  if (work.measures) {
    const bool merged =
        measure_chunk<kUnscales>(tensors, work.chunk, t, pass.application.settings.inverse_scale,
                                 pass.partials, pass.counters, pass.rows, arrives_last);
    if (merged && threadIdx.x == 0) {
      fence();
      atomicExch(pass.counters + t, static_cast<uint32_t>(tensors.chunks(t)) + 1);
    }
  } else {
    apply_chunk<kUnscales>(pass.application, work.chunk, t, [&] {
      uint32_t* counter = pass.counters + t;
      const auto total = static_cast<uint32_t>(tensors.chunks(t));
      wait_until_above(counter, total);
      if (atomicAdd(counter, 1u) == 2 * total) *counter = 0;
    });
  }
}

template <int kCapacity>
void pass_over(const Modulation& modulation, const Cuda& cuda) {
  const Gradient* gradient = modulation.gradients;
  const Gradient* end = gradient + modulation.count;
  int cache_bytes = 0;
  check(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, cuda.index),
        "cudaDeviceGetAttribute");
  const Workspace workspace = Workspace::for_chunks(cuda, chunks_of(gradient, modulation.count));
  Pass<kCapacity> pass;
  pass.application.settings = settings_of(modulation, workspace.rows, workspace);
  pass.rows = workspace.rows;
  pass.partials = workspace.partials;
  pass.counters = workspace.tensor_counters;
  pass.ticket = workspace.ticket;
  const auto kernel = modulation.inverse_scale ? single_launch_kernel<kCapacity, true>
                                               : single_launch_kernel<kCapacity, false>;
  while (gradient != end) {
    gradient = pass.fill(gradient, end, cache_bytes / kWavesInCache);
    pass.application.settings.advance = gradient == end ? modulation.advance : nullptr;
    // In two dimensions there is room for twice the chunks.
    const auto chunks = static_cast<unsigned>(pass.application.tensors.chunks());
    launch(kernel, dim3(chunks, 2), kThreads, cuda, pass);
  }
}

}  // namespace

void modulate_in_one_launch(const Modulation& modulation, const Cuda& cuda) {
  (modulation.count <= kFew ? pass_over<kFew> : pass_over<kMany>)(modulation, cuda);
}

}  // namespace mmbal::cuda
