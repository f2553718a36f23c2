#include "operations.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "math/convert.h"
#include "math/speed.h"

namespace mmbal::cpu {
namespace {

// Tensors measured before they are updated: small enough to be in cache still when they are.
constexpr int64_t kWaveBytes = 8 << 20;

struct Chunk {
  int32_t gradient;
  int64_t index;
};

// Memory kept between calls, so that a step allocates nothing after the first.
struct Scratch {
  std::vector<Chunk> chunks;
  std::vector<Partial> partials;
  std::vector<Moments> moments;
  std::vector<double> row_scores;
};

Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

constexpr int64_t kGrain = 8;  // chunks a thread takes at a time

// The chunks of gradients [0, count) in order; returns how many elements they hold.
int64_t list_chunks(const Gradient* gradients, int64_t count, std::vector<Chunk>& chunks) {
  chunks.clear();
  int64_t elements = 0;
  for (int64_t g = 0; g < count; ++g) {
    elements += gradients[g].count;
    for (int64_t c = 0; c * kChunk < gradients[g].count; ++c) {
      chunks.push_back({static_cast<int32_t>(g), c});
    }
  }
  return elements;
}

struct Span {
  char* data;
  int64_t count;
  int64_t index;  // of the first element in its tensor
};

Span span(const Gradient& gradient, const Chunk& chunk) {
  const int64_t first = chunk.index * kChunk;
  return {static_cast<char*>(gradient.data) + first * size_of(gradient.dtype),
          std::min(kChunk, gradient.count - first), first};
}

// Moments of every gradient, into `out` in the gradients' order. prepare(dtype, span) comes before
// a chunk is read.
template <class Prepare>
void measure(const Gradient* gradients, int64_t count, const std::vector<Chunk>& chunks,
             int threads, std::vector<Partial>& partials, std::vector<Moments>& out,
             Prepare&& prepare) {
  const KernelTable& table = kernels();
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

void moments(const Gradient* gradients, int64_t count, double* out, int threads) {
  Scratch& memory = scratch();
  const int64_t elements = list_chunks(gradients, count, memory.chunks);
  measure(gradients, count, memory.chunks, useful_threads(elements / kReadsPerWork, threads),
          memory.partials, memory.moments, [](DType, const Span&) {});
  for (int64_t g = 0; g < count; ++g) {
    const Moments& m = memory.moments[g];
    std::copy_n(&m.count, 3, out + 3 * gradients[g].row);
  }
}

void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation, int threads) {
  const KernelTable& table = kernels();
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
    const int useful = useful_threads(noisy ? elements : elements / kReadsPerWork, threads);
    if (measured) {
      measure(wave, end - begin, memory.chunks, useful, memory.partials, memory.moments, unscale);
    }
    const auto amplitude = [&](int64_t g, double k) {
      if (!noisy) return 0.0;
      const double* given = modulation.moments + 3 * wave[g].row;
      const Moments tensor = measured ? memory.moments[g] : Moments{given[0], given[1], given[2]};
      if (!is_finite(tensor.m2)) finite = false;
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

void noise(const Gradient& tensor, const NoiseSource& source, int threads) {
  Scratch& memory = scratch();
  const KernelTable& table = kernels();
  const int64_t elements = list_chunks(&tensor, 1, memory.chunks);
  const NoiseKey key{source.seed, low_word(source), tensor.id};
  const std::vector<Chunk>& chunks = memory.chunks;
  parallel_for(static_cast<int64_t>(chunks.size()), kGrain, useful_threads(elements, threads),
               [&](int64_t i) {
                 const Span part = span(tensor, chunks[i]);
                 table.noise[static_cast<int>(tensor.dtype)](
                     part.data, part.count, key,
                     static_cast<uint64_t>(tensor.offset) + static_cast<uint64_t>(part.index));
               });
}

void philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]) {
  kernels().philox(counter, key, rounds, words);
}

void scores(const Scores& args, int threads) {
  const KernelTable& table = kernels();
  std::vector<double>& row_scores = scratch().row_scores;
  const int64_t rows = args.modalities * args.batch;
  row_scores.assign(static_cast<size_t>(rows), 0.0);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, args.classes));
  std::atomic<bool> in_range{true};
  const int64_t work = rows * (args.classes + 32);  // a row's sums take as long as 32 more
  parallel_for(rows, grain, useful_threads(work, threads), [&](int64_t i) {
    const int64_t m = i / args.batch;
    const int64_t b = i % args.batch;
    const int64_t at = b * args.classes * size_of(args.dtypes[m]);
    const char* row = static_cast<const char*>(args.logits[m]) + at;
    const int dtype = static_cast<int>(args.dtypes[m]);
    if (args.labels == nullptr) {
      row_scores[i] = table.soft_row_score[dtype](row, args.classes,
                                                  static_cast<const char*>(args.soft[m]) + at);
    } else if (args.labels[b] == args.ignore_index) {
      return;
    } else if (args.labels[b] >= 0 && args.labels[b] < args.classes) {
      row_scores[i] = table.row_score[dtype](row, args.classes, args.labels[b]);
    } else {
      in_range = false;
    }
  });
  if (!in_range && args.status) *args.status |= kLabelOutOfRange;
  for (int64_t m = 0; m < args.modalities; ++m) {
    double sum = 0;
    for (int64_t b = 0; b < args.batch; ++b) sum += row_scores[m * args.batch + b];
    args.state[m] = (args.accumulate ? args.state[m] : 0.0f) + static_cast<float>(sum);
  }
  derive({args.state, args.modalities, true, args.alpha, args.rule});
}

void derive(const Derivation& args) {
  float* ratios = args.state + args.modalities;
  float* coefficients = ratios + args.modalities;
  for (int64_t m = 0; m < args.modalities; ++m) {
    if (args.ratios) ratios[m] = discrepancy_ratio(args.state, args.modalities, m);
    if (args.rule != Rule::kNone) {
      coefficients[m] = modulation_coefficient(ratios[m], args.alpha, args.rule);
    }
  }
}

void accumulate_speeds(const Speeds& args) {
  std::vector<double> ratios(static_cast<size_t>(args.groups));
  bool finite = true;
  for (int64_t g = 0; g < args.groups; ++g) {
    const double* members = args.membership + g * args.tensors;
    const double weights = group_norm(args.moments, members, args.tensors, 0, 1);
    const double gradients =
        group_norm(args.moments + 3 * args.tensors, members, args.tensors, 0, 1);
    ratios[g] = gradients / weights;
    finite &= is_finite(ratios[g]);
  }
  *args.finite = finite;
  if (!finite || (args.active && !*args.active)) return;
  for (int64_t g = 0; g < args.groups; ++g) args.totals[g] += ratios[g];
}

}  // namespace mmbal::cpu
