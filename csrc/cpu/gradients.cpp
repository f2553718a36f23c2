#include "operations/gradients.h"

#include <atomic>

#include "cpu/chunks.h"
#include "cpu/dispatch.h"
#include "cpu/kernels/gradients.h"
#include "device.h"

namespace mmbal {
namespace {

// Tensors measured before they are updated: small enough to be in cache still when they are.
constexpr int64_t kWaveBytes = 8 << 20;

// Memory kept between calls, so that a step allocates nothing after the first.
struct Scratch {
  std::vector<Chunk> chunks;
  std::vector<Partial> partials;
  std::vector<Moments> moments;
};

Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

// Moments of every gradient, into `out` in the gradients' order. prepare(dtype, span) comes before
// a chunk is read.
template <class Prepare>
void measure_chunks(const Gradient* gradients, int64_t count, const std::vector<Chunk>& chunks,
                    int threads, std::vector<Partial>& partials, std::vector<Moments>& out,
                    Prepare&& prepare) {
  const auto& table = kernels<GradientKernels>();
  const auto total = static_cast<int64_t>(chunks.size());
  partials.resize(chunks.size());
  out.resize(static_cast<size_t>(count));
  parallel_for(total, kGrain, threads, [&](int64_t i) {
    const Gradient& gradient = gradients[chunks[i].gradient];
    const Span part = span(gradient, chunks[i]);
    prepare(gradient.dtype, part);
    partials[i] = table.moments[static_cast<int>(gradient.dtype)](part.data, part.count);
  });
  const Partial* next = partials.data();
  for (int64_t g = 0; g < count; ++g) {
    out[g] = merge(next, gradients[g].count);
    next += (gradients[g].count + kChunk - 1) / kChunk;
  }
}

double largest_of(DType dtype) {
  constexpr double kLargestOf[kDTypes] = {kLargest<float>, kLargest<double>, kLargest<Half>,
                                          kLargest<BFloat16>};
  return kLargestOf[static_cast<int>(dtype)];
}

uint32_t low_word(const NoiseSource& source) {
  return static_cast<uint32_t>(source.step_pointer ? *source.step_pointer : source.step);
}

}  // namespace

template <>
void measure(const Measurement& args, const Cpu& cpu) {
  Scratch& memory = scratch();
  const int64_t elements = list_chunks(args.gradients, args.count, memory.chunks);
  measure_chunks(args.gradients, args.count, memory.chunks,
                 useful_threads(elements / kReadsPerWork, cpu.threads), memory.partials,
                 memory.moments, [](DType, const Span&) {});
  for (int64_t g = 0; g < args.count; ++g) {
    const Moments& m = memory.moments[g];
    std::copy_n(&m.count, 3, args.out + 3 * args.gradients[g].row);
  }
}

template <>
void modulate(const Modulation& modulation, const Cpu& cpu) {
  const Gradient* gradients = modulation.gradients;
  const int64_t count = modulation.count;
  const auto& table = kernels<GradientKernels>();
  Scratch& memory = scratch();
  const uint32_t step = low_word(modulation.source);
  const bool noisy = modulation.noise != 0;
  const bool measured = modulation.measures();
  std::atomic<bool> finite{true};
  std::atomic<bool> finite_before{true};
  const auto unscale = [&](DType dtype, const Span& part) {
    if (modulation.inverse_scale == nullptr) return;
    const double factor = *modulation.inverse_scale;
    if (!table.scale[static_cast<int>(dtype)](part.data, part.count, factor)) finite_before = false;
  };
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    int64_t bytes = 0;
    do {
      bytes += gradients[end].count * size_of(gradients[end].dtype);
    } while (++end < count && (bytes < kWaveBytes || !measured));
    const Gradient* wave = gradients + begin;
    const int64_t elements = list_chunks(wave, end - begin, memory.chunks);
    const int useful = useful_threads(noisy ? elements : elements / kReadsPerWork, cpu.threads);
    if (measured) {
      measure_chunks(wave, end - begin, memory.chunks, useful, memory.partials, memory.moments,
                     unscale);
    }
    const auto amplitude = [&](int64_t g, double k) {
      if (!noisy) return 0.0;
      const double* given = modulation.moments + 3 * wave[g].row;
      const Moments tensor = measured ? memory.moments[g] : Moments{given[0], given[1], given[2]};
      if (!holds_numbers(tensor)) finite = false;
      return noise_amplitude(tensor, k, modulation.noise, modulation.eps,
                             largest_of(wave[g].dtype));
    };
    // Forwards, as hardware prefetches.
    const std::vector<Chunk>& chunks = memory.chunks;
    parallel_for(static_cast<int64_t>(chunks.size()), kGrain, useful, [&](int64_t i) {
      const Chunk& chunk = chunks[i];
      const Gradient& gradient = wave[chunk.gradient];
      const Span part = span(gradient, chunk);
      if (!measured) unscale(gradient.dtype, part);
      const double k = usable_coefficient(modulation.coefficients[gradient.modality]);
      const int dtype = static_cast<int>(gradient.dtype);
      const double scale = amplitude(chunk.gradient, k);
      if (scale != 0) {
        table.scale_and_add_noise[dtype](
            part.data, part.count, k, scale, {modulation.source.seed, step, gradient.id},
            static_cast<uint64_t>(gradient.offset) + static_cast<uint64_t>(part.index));
      } else if (k != 1 || (modulation.status && !noisy)) {
        if (!table.scale[dtype](part.data, part.count, k)) finite = false;
      }
    });
  }
  if (modulation.status && !finite) *modulation.status |= kNonFiniteGradient;
  if (!finite_before) *modulation.found_inf = 1;
  if (modulation.advance) ++*modulation.advance;
}

template <>
void fill_with_noise(const Noise& args, const Cpu& cpu) {
  const auto& table = kernels<GradientKernels>();
  const Gradient& tensor = args.target;
  Scratch& memory = scratch();
  const int64_t elements = list_chunks(&tensor, 1, memory.chunks);
  const NoiseKey key{args.source.seed, low_word(args.source), tensor.id};
  const std::vector<Chunk>& chunks = memory.chunks;
  parallel_for(static_cast<int64_t>(chunks.size()), kGrain, useful_threads(elements, cpu.threads),
               [&](int64_t i) {
                 const Span part = span(tensor, chunks[i]);
                 table.noise[static_cast<int>(tensor.dtype)](
                     part.data, part.count, key,
                     static_cast<uint64_t>(tensor.offset) + static_cast<uint64_t>(part.index));
               });
}

template <>
void philox(const PhiloxBlock& args, const Cpu&) {
  kernels<GradientKernels>().philox(args.counter, args.key, args.rounds, args.words);
}

}  // namespace mmbal
