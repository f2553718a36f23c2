// Mean and M2 of a chunk.
#pragma once

#include "cpu/lanes.h"
#include "math/moments.h"

namespace mmbal {
namespace {

// Elements whose mean is the pivot that a chunk's deviations are taken from, at first.
constexpr int64_t kSample = 256;

// In float64: for float64 data, and for values whose squares leave float32's range.
template <class T>
Partial moments_in_double(const void* data, int64_t count) {
  const T* x = static_cast<const T*>(data);
  Partial result{};
  for (const int64_t sample : {count < kSample ? count : kSample, count}) {
    double lanes[kLanes] = {};
    for_each_in_lanes(x, sample,
                      [&](T value, int lane) { lanes[lane] += kSumUnit * to_double(value); });
    const double pivot = pairwise_sum(lanes) / (kSumUnit * static_cast<double>(sample));
    double shifted[kLanes] = {};
    double squares[kLanes] = {};
    for_each_in_lanes(x, count, [&](T value, int lane) {
      const double d = to_double(value) - pivot;
      shifted[lane] += kSumUnit * to_double(value) - kSumUnit * pivot;
      squares[lane] += d * d;
    });
    result = partial_from_shifted(pivot, pairwise_sum(shifted) / kSumUnit, pairwise_sum(squares),
                                  static_cast<double>(count));
    // About the mean of all no sum overflows that need not.
    if (is_finite(result.mean)) break;
  }
  return result;
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

}  // namespace
}  // namespace mmbal
