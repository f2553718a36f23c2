#include "cpu/kernels.h"

#include <type_traits>

#include "cpu/simd.h"
#include "math/modulation.h"
#include "math/normal.h"
#include "math/softmax.h"

#define MMBAL_CONCAT_(a, b) a##b
#define MMBAL_CONCAT(a, b) MMBAL_CONCAT_(a, b)
#define MMBAL_STRING_(a) #a
#define MMBAL_STRING(a) MMBAL_STRING_(a)

namespace mmbal {
namespace {

constexpr int kGroup = 4 * kWidth;  // elements that one vector Philox call makes
constexpr int kLanes = 32;          // running sums: the same on every instruction set
constexpr int kVectors = kLanes / kWidth;

// By halves: what adds whole vectors, in an order that no width of them changes.
template <int n>
double pairwise_sum(double (&x)[n]) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

double sum_lanes(const FloatVector* v) {
  float lanes[kLanes];
  double wide[kLanes];
  // One by one: a copy of them all would keep them in memory, and out of registers before it.
  unroll<kVectors>([&](auto j) { store(lanes + j * kWidth, v[j]); });
  for (int i = 0; i < kLanes; ++i) wide[i] = lanes[i];
  return pairwise_sum(wide);
}

MMBAL_HD double to_double(double x) { return x; }
MMBAL_HD double to_double(float x) { return x; }
template <class T>
MMBAL_HD double to_double(T x) {
  return to_float(x);
}
template <class T>
MMBAL_HD T splat_as(float x);
template <>
MMBAL_HD double splat_as<double>(float x) {
  return x;
}
template <>
MMBAL_HD float splat_as<float>(float x) {
  return x;
}
template <>
MMBAL_HD Half splat_as<Half>(float x) {
  return to_half(x);
}
template <>
MMBAL_HD BFloat16 splat_as<BFloat16>(float x) {
  return to_bfloat16(x);
}

// ------------------------------------------------------------------------------------ moments

// Elements whose mean is the pivot that a chunk's deviations are taken from, at first.
constexpr int64_t kSample = 256;

// Calls f(element, lane) with lanes that are the same on every instruction set.
template <class T, class F>
MMBAL_HD void for_each_in_lanes(T* x, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(x[i + lane], lane);
  }
  for (int lane = 0; i + lane < count; ++lane) f(x[i + lane], lane);
}

// In float64: for float64 data, and for values whose squares leave float32's range.
template <class T>
Partial moments_in_double(const void* data, int64_t count) {
  const T* x = static_cast<const T*>(data);
  double lanes[kLanes] = {};
  const int64_t sample = count < kSample ? count : kSample;
  for_each_in_lanes(x, sample, [&](T value, int lane) { lanes[lane] += to_double(value); });
  const double pivot = pairwise_sum(lanes) / static_cast<double>(sample);
  double shifted[kLanes] = {};
  double squares[kLanes] = {};
  for_each_in_lanes(x, count, [&](T value, int lane) {
    const double d = to_double(value) - pivot;
    shifted[lane] += d;
    squares[lane] += d * d;
  });
  return partial_from_shifted(pivot, pairwise_sum(shifted), pairwise_sum(squares),
                              static_cast<double>(count));
}

// Calls f(vectors) for every kLanes elements, the last ones padded with `filler`.
template <class T, class F>
MMBAL_HD void for_each_lanes(const T* x, int64_t count, float filler, F&& f) {
  FloatVector v[kVectors];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    unroll<kVectors>([&](auto j) { v[j] = load(x + i + j * kWidth); });
    f(v);
  }
  if (i == count) return;
  float padded[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    padded[lane] = i + lane < count ? static_cast<float>(to_double(x[i + lane])) : filler;
  }
  unroll<kVectors>([&](auto j) { v[j] = load(padded + j * kWidth); });
  f(v);
}

// Deviations from the pivot and their squares, both summed: one pass.
template <class T>
void deviations(const T* x, int64_t count, float pivot, double* sum, double* squares) {
  const FloatVector center = Simd::splat(pivot);
  FloatVector shifted[kVectors] = {};
  FloatVector squared[kVectors] = {};
  for_each_lanes(x, count, pivot, [&](const FloatVector* v) {
    unroll<kVectors>([&](auto j) {
      const FloatVector d = v[j] - center;
      shifted[j] += d;
      squared[j] = Simd::fma(d, d, squared[j]);
    });
  });
  *sum = sum_lanes(shifted);
  *squares = sum_lanes(squared);
}

template <class T>
Partial moments(const void* data, int64_t count) {
  const T* x = static_cast<const T*>(data);
  if (count == 1) return {to_double(x[0]), to_double(x[0]) - to_double(x[0])};  // NaN: not finite
  const int64_t sample = count < kSample ? count : kSample;
  FloatVector sum[kVectors] = {};
  for_each_lanes(x, sample, 0.0f,
                 [&](const FloatVector* v) { unroll<kVectors>([&](auto j) { sum[j] += v[j]; }); });
  float pivot = static_cast<float>(sum_lanes(sum) / static_cast<double>(sample));
  Partial result{};
  for (int attempt = 0; attempt < 2; ++attempt) {
    double shifted, squares;
    deviations(x, count, pivot, &shifted, &squares);
    if (squares_out_of_range(squares, static_cast<double>(count))) {
      bool constant = true;
      for (int64_t i = 1; i < count; ++i) constant &= to_double(x[i]) == to_double(x[0]);
      if (constant && is_finite(to_double(x[0]))) return {to_double(x[0]), 0.0};
      return moments_in_double<T>(data, count);
    }
    result = partial_from_shifted(pivot, shifted, squares, static_cast<double>(count));
    // More than half cancels: the sample was not like the rest. About the mean nothing does.
    if (squares <= 2 * result.m2) break;
    pivot = static_cast<float>(result.mean);
  }
  return result;
}

// -------------------------------------------------------------------------------------- noise

// Calls sink(i, z) with the normals of elements index + i .. index + i + kGroup - 1, for
// i = 0, kGroup, ... below count; index must be a multiple of 4. The last call may pass the end.
// `lane` is block_of_lane of the type that they are for.
template <class Sink>
MMBAL_HD void for_each_group(const NoiseKey key, uint64_t index, int64_t count,
                             const UintVector lane, Sink&& sink) {
  const auto words_of = [&](uint64_t block) {
    const UintVector low = lane + static_cast<uint32_t>(block);
    // Where the low word wrapped, the comparison is -1: the carry.
    const UintVector high = static_cast<uint32_t>(block >> 32) - (UintVector)(low < lane);
    const auto words =
        noise_words<PhiloxLanes>(key, PhiloxLanes::widen(low), PhiloxLanes::widen(high));
    return Words<UintVector>{PhiloxLanes::narrow(words.w0), PhiloxLanes::narrow(words.w1),
                             PhiloxLanes::narrow(words.w2), PhiloxLanes::narrow(words.w3)};
  };
  if (count <= 0) return;
  // The words of the next group are computed beside the normals of this one: two chains of
  // dependent operations, where one would leave the processor waiting.
  uint64_t block = index >> 2;
  auto words = words_of(block);
  int64_t i = 0;
  for (; i + kGroup < count; i += kGroup) {
    block += kWidth;
    const auto z = normals<Simd>(words);
    words = words_of(block);
    sink(i, z);
  }
  sink(i, normals<Simd>(words));
}

void philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]) {
  using V = PhiloxLanes;
  const Words<V::U> c{V::splat(counter[0]), V::splat(counter[1]), V::splat(counter[2]),
                      V::splat(counter[3])};
  const Words<V::U> w =
      rounds == 7 ? philox4x32<V, 7>(c, key[0], key[1]) : philox4x32<V>(c, key[0], key[1]);
  words[0] = V::narrow(w.w0)[0];
  words[1] = V::narrow(w.w1)[0];
  words[2] = V::narrow(w.w2)[0];
  words[3] = V::narrow(w.w3)[0];
}

// Normals for a run that does not start at a block: `buffer` gets the run's blocks, and the run
// starts at the returned offset. The buffer holds kRun + 2 groups.
constexpr int64_t kRun = 1024;

// What noise alone makes of an element and its normal.
MMBAL_HD FloatVector second(FloatVector, FloatVector z) { return z; }

const float* normals_of_run(const NoiseKey& key, uint64_t index, int64_t count, float* buffer) {
  const int64_t skip = static_cast<int64_t>(index & 3);
  for_each_group(
      key, index - static_cast<uint64_t>(skip), count + skip, block_of_lane(buffer),
      [&](int64_t i, const Quad<FloatVector>& z) { transform_group(buffer + i, z, second); });
  return buffer + skip;
}

template <class T>
struct Update {
  FloatVector k, amplitude;

  MMBAL_HD FloatVector operator()(FloatVector g, FloatVector z) const {
    return saturate(Simd::fma(amplitude, z, k * g), g);
  }
  MMBAL_HD FloatVector scaled(FloatVector g) const { return saturate(k * g, g); }

  // Finite gradients stay finite in float16.
  static MMBAL_HD FloatVector saturate(FloatVector y, FloatVector g) {
    if constexpr (std::is_same_v<T, Half>) {
      const FloatVector limit = Simd::splat(kHalfMax);
      const FloatVector clamped = y > limit ? limit : y < -limit ? -limit : y;
      return g - g == 0.0f ? clamped : y;
    } else {
      return y;
    }
  }
};

// data[i] <- f(i, data[i]) for whole vectors, the rest through a padded copy.
template <class T, class F>
MMBAL_HD void transform_tail(T* x, int64_t count, F&& f) {
  if (count <= 0) return;
  T padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = i < count ? x[i] : splat_as<T>(0.0f);
  store(padded, f(load(padded)));
  for (int64_t i = 0; i < count; ++i) x[i] = padded[i];
}

template <class T>
void scale_and_add_noise(void* data, int64_t count, double k, double amplitude, const NoiseKey& key,
                         uint64_t index) {
  T* x = static_cast<T*>(data);
  const Update<T> update{Simd::splat(static_cast<float>(k)),
                         Simd::splat(static_cast<float>(amplitude))};
  if ((index & 3) == 0) {
    const int64_t whole = count - count % kGroup;
    for_each_group(key, index, whole, block_of_lane(x), [&](int64_t i, const Quad<FloatVector>& z) {
      transform_group(x + i, z, update);
    });
    x += whole;
    count -= whole;
    index += static_cast<uint64_t>(whole);
  }
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    int64_t i = 0;
    for (; i + kWidth <= run; i += kWidth) store(x + i, update(load(x + i), load(z + i)));
    transform_tail(x + i, run - i, [&](FloatVector g) { return update(g, load(z + i)); });
  }
}

template <>
void scale_and_add_noise<double>(void* data, int64_t count, double k, double amplitude,
                                 const NoiseKey& key, uint64_t index) {
  double* x = static_cast<double*>(data);
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    for (int64_t i = 0; i < run; ++i) x[i] = k * x[i] + amplitude * static_cast<double>(z[i]);
  }
}

template <class T, class F>
MMBAL_HD bool scale_by(T* x, int64_t count, bool writes, F&& scaled) {
  constexpr int kSums = 4;         // enough to hide the latency of a multiply-add
  FloatVector finite[kSums] = {};  // becomes NaN where an element is NaN or Inf
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
    unroll<kSums>([&](auto v) {
      const FloatVector g = load(x + i + v * kWidth);
      finite[v] = Simd::fma(g, FloatVector{}, finite[v]);
      if (writes) store(x + i + v * kWidth, scaled(g));
    });
  }
  for (; i < count; i += kWidth) {
    transform_tail(x + i, count - i < kWidth ? count - i : kWidth, [&](FloatVector g) {
      finite[0] = Simd::fma(g, FloatVector{}, finite[0]);
      return scaled(g);
    });
  }
  const FloatVector sum = (finite[0] + finite[1]) + (finite[2] + finite[3]);
  bool all = true;
  for (int lane = 0; lane < kWidth; ++lane) all &= sum[lane] == 0.0f;
  return all;
}

template <class T>
bool scale(void* data, int64_t count, double k) {
  T* x = static_cast<T*>(data);
  const Update<T> update{Simd::splat(static_cast<float>(k)), {}};
  if (std::fabs(k) <= 1) {  // nothing to saturate
    return scale_by(x, count, k != 1, [&](FloatVector g) { return update.k * g; });
  }
  return scale_by(x, count, true, [&](FloatVector g) { return update.scaled(g); });
}

template <>
bool scale<double>(void* data, int64_t count, double k) {
  double* x = static_cast<double*>(data);
  double finite[kLanes] = {};
  for_each_in_lanes(x, count, [&](double& value, int lane) {
    finite[lane] += value * 0.0;
    if (k != 1) value *= k;
  });
  return pairwise_sum(finite) == 0;
}

template <class T>
void noise(void* data, int64_t count, const NoiseKey& key, uint64_t index) {
  T* x = static_cast<T*>(data);
  if ((index & 3) == 0) {
    const int64_t whole = count - count % kGroup;
    for_each_group(key, index, whole, block_of_lane(x), [&](int64_t i, const Quad<FloatVector>& z) {
      transform_group(x + i, z, second);
    });
    x += whole;
    count -= whole;
    index += static_cast<uint64_t>(whole);
  }
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    int64_t i = 0;
    for (; i + kWidth <= run; i += kWidth) store(x + i, load(z + i));
    transform_tail(x + i, run - i, [&](FloatVector) { return load(z + i); });
  }
}

template <>
void noise<double>(void* data, int64_t count, const NoiseKey& key, uint64_t index) {
  double* x = static_cast<double*>(data);
  float buffer[kRun + 2 * kGroup];
  for (; count > 0; x += kRun, count -= kRun, index += kRun) {
    const int64_t run = count < kRun ? count : kRun;
    const float* z = normals_of_run(key, index, run, buffer);
    for (int64_t i = 0; i < run; ++i) x[i] = z[i];
  }
}

// ------------------------------------------------------------------------------------- scores

constexpr int kRowLanes = 16;
constexpr int kRowVectors = kRowLanes / kWidth;

// Calls f(vectors) for every kRowLanes logits of a row, the last ones padded with -inf.
template <class T, class F>
MMBAL_HD void for_each_logit(const T* row, int64_t classes, F&& f) {
  FloatVector x[kRowVectors];
  int64_t c = 0;
  for (; c + kRowLanes <= classes; c += kRowLanes) {
    unroll<kRowVectors>([&](auto v) { x[v] = load(row + c + v * kWidth); });
    f(c, x);
  }
  if (c == classes) return;
  T padded[kRowLanes];
  for (int i = 0; i < kRowLanes; ++i) {
    padded[i] = c + i < classes ? row[c + i] : splat_as<T>(-HUGE_VALF);
  }
  unroll<kRowVectors>([&](auto v) { x[v] = load(padded + v * kWidth); });
  f(c, x);
}

template <class T>
float row_max(const T* row, int64_t classes) {
  FloatVector top[kRowVectors];
  unroll<kRowVectors>([&](auto v) { top[v] = Simd::splat(-HUGE_VALF); });
  for_each_logit(row, classes, [&](int64_t, const FloatVector* x) {
    unroll<kRowVectors>([&](auto v) { top[v] = Simd::max(top[v], x[v]); });
  });
  float lanes[kRowLanes];
  unroll<kRowVectors>([&](auto v) { store(lanes + v * kWidth, top[v]); });
  float result = lanes[0];
  for (int i = 1; i < kRowLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

double sum_row_lanes(const FloatVector* v) {
  float lanes[kRowLanes];
  double wide[kRowLanes];
  unroll<kRowVectors>([&](auto j) { store(lanes + j * kWidth, v[j]); });
  for (int i = 0; i < kRowLanes; ++i) wide[i] = lanes[i];
  return pairwise_sum(wide);
}

template <class T>
double row_score(const void* data, int64_t classes, int64_t label) {
  const T* row = static_cast<const T*>(data);
  const float top = row_max(row, classes);
  const FloatVector shift = Simd::splat(top);
  FloatVector sum[kRowVectors] = {};
  for_each_logit(row, classes, [&](int64_t, const FloatVector* x) {
    unroll<kRowVectors>([&](auto v) { sum[v] += exp_nonpositive<Simd>(x[v] - shift); });
  });
  const float own = static_cast<float>(to_double(row[label])) - top;
  return exp_nonpositive<Scalar>(own) / sum_row_lanes(sum);
}

template <class T>
double soft_row_score(const void* data, int64_t classes, const void* weights) {
  const T* row = static_cast<const T*>(data);
  const T* weight = static_cast<const T*>(weights);
  const FloatVector shift = Simd::splat(row_max(row, classes));
  FloatVector sum[kRowVectors] = {};
  FloatVector weighted[kRowVectors] = {};
  for_each_logit(row, classes, [&](int64_t c, const FloatVector* x) {
    unroll<kRowVectors>([&](auto v) {
      const FloatVector e = exp_nonpositive<Simd>(x[v] - shift);
      T padded[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t at = c + v * kWidth + i;
        padded[i] = at < classes ? weight[at] : splat_as<T>(0.0f);
      }
      sum[v] += e;
      weighted[v] = Simd::fma(e, load(padded), weighted[v]);
    });
  });
  return sum_row_lanes(weighted) / sum_row_lanes(sum);
}

double double_row_sum(const double* row, int64_t classes, const double* weights, double* own) {
  double top = -HUGE_VAL;
  for (int64_t c = 0; c < classes; ++c) top = row[c] > top ? row[c] : top;
  double sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const double e = std::exp(row[c] - top);
    sum += e;
    if (weights) *own += e * weights[c];
  }
  return weights ? sum : (*own = top, sum);
}

template <>
double row_score<double>(const void* data, int64_t classes, int64_t label) {
  const double* row = static_cast<const double*>(data);
  double top = 0;
  const double sum = double_row_sum(row, classes, nullptr, &top);
  return std::exp(row[label] - top) / sum;
}

template <>
double soft_row_score<double>(const void* data, int64_t classes, const void* weights) {
  double own = 0;
  const double sum = double_row_sum(static_cast<const double*>(data), classes,
                                    static_cast<const double*>(weights), &own);
  return own / sum;
}

}  // namespace
}  // namespace mmbal

#include "cpu/cross_entropy.h"

namespace mmbal {

// The order of DType.
#define MMBAL_FOR_EACH_DTYPE(f) {f<float>, f<double>, f<Half>, f<BFloat16>}

extern const KernelTable MMBAL_CONCAT(kernels_, MMBAL_ISA);
const KernelTable MMBAL_CONCAT(kernels_, MMBAL_ISA) = {
    MMBAL_STRING(MMBAL_ISA),
    philox,
    {moments<float>, moments_in_double<double>, moments<Half>, moments<BFloat16>},
    MMBAL_FOR_EACH_DTYPE(scale),
    MMBAL_FOR_EACH_DTYPE(scale_and_add_noise),
    MMBAL_FOR_EACH_DTYPE(noise),
    MMBAL_FOR_EACH_DTYPE(row_score),
    MMBAL_FOR_EACH_DTYPE(soft_row_score),
    MMBAL_FOR_EACH_DTYPE(cross_entropy),
    MMBAL_FOR_EACH_DTYPE(cross_entropy_gradient),
};

}  // namespace mmbal
