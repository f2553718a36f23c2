// Count, mean and sum of squared deviations (M2) of gradient elements.
#pragma once

#include "math/platform.h"

namespace mmbal {

// Elements a chunk holds on every backend: the unit of work and of deterministic merging.
constexpr int64_t kChunk = 4096;

// Float64 values are added up in these units, so that a sum of them does not overflow where they do
// not. A power of 2 rounds nothing.
constexpr double kSumUnit = 0x1p-40;

// Of one chunk. The count is known from the chunk's position.
struct Partial {
  double mean;
  double m2;
};

struct Moments {
  double count;
  double mean;
  double m2;
};

namespace {

MMBAL_HD double chunk_size(int64_t count, int64_t chunk) {
  const int64_t rest = count - chunk * kChunk;
  return static_cast<double>(rest < kChunk ? rest : kChunk);
}

// A chunk's squared deviations from another mean.
MMBAL_HD double m2_about(const Partial& chunk, double mean, double count) {
  const double d = chunk.mean - mean;
  return chunk.m2 + count * d * d;
}

MMBAL_HD bool is_finite(double x) { return x - x == 0; }

// A chunk from sums over its values x shifted by any pivot near their mean:
// sum = sum(x - pivot), squares = sum((x - pivot)^2). Correcting by sum makes the pivot's own
// rounding harmless. Squares that overflow float64 stay infinite.
MMBAL_HD Partial partial_from_shifted(double pivot, double sum, double squares, double count) {
  const double m2 = is_finite(squares) ? squares - sum * sum / count : squares;
  return {pivot + sum / count, m2 > 0 || m2 != m2 ? m2 : 0.0};
}

// Whether squares taken in float32 over- or underflowed, so that the chunk must be measured again
// with scaled values. NaN counts as overflow.
MMBAL_HD bool squares_out_of_range(double squares, double count) {
  return !(squares <= 1e37 && squares >= 1e-35 * count);
}

// A tensor of `count` elements from its chunks, in fixed order: Chan's formula with the mean of all
// as the common pivot, which needs no division per chunk.
MMBAL_HD Moments merge(const Partial* chunks, int64_t count) {
  const int64_t last = (count - 1) / kChunk;
  double sum = 0;
  for (int64_t c = 0; c <= last; ++c) sum += chunks[c].mean * (kSumUnit * chunk_size(count, c));
  const double mean = sum / (kSumUnit * static_cast<double>(count));
  double m2 = 0;
  for (int64_t c = 0; c <= last; ++c) m2 += m2_about(chunks[c], mean, chunk_size(count, c));
  return {static_cast<double>(count), mean, m2};
}

// Sum of squares of the elements themselves.
MMBAL_HD double squared_norm(double count, double mean, double m2) {
  return m2 + count * mean * mean;
}

// Unbiased standard deviation; 0 for a single element (methods that add noise of this scale must
// not blow up on scalars).
MMBAL_HD double standard_deviation(double count, double m2) {
  return count > 1 ? std::sqrt(m2 / (count - 1)) : 0.0;
}

}  // namespace
}  // namespace mmbal
