// Rows of logits, and their softmax at a label or under soft labels.
#pragma once

#include "cpu/lanes.h"
#include "math/softmax.h"

namespace mmbal {
namespace {

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

inline double sum_row_lanes(const FloatVector* v) {
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

inline double double_row_sum(const double* row, int64_t classes, const double* weights,
                             double* own) {
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
inline double row_score<double>(const void* data, int64_t classes, int64_t label) {
  const double* row = static_cast<const double*>(data);
  double top = 0;
  const double sum = double_row_sum(row, classes, nullptr, &top);
  return std::exp(row[label] - top) / sum;
}

template <>
inline double soft_row_score<double>(const void* data, int64_t classes, const void* weights) {
  double own = 0;
  const double sum = double_row_sum(static_cast<const double*>(data), classes,
                                    static_cast<const double*>(weights), &own);
  return own / sum;
}

}  // namespace
}  // namespace mmbal
