// Running sums that are the same on every instruction set, and elements that do not fill a vector.
#pragma once

#include "cpu/simd.h"

namespace mmbal {
namespace {

constexpr int kLanes = 32;  // running sums: the same on every instruction set
constexpr int kVectors = kLanes / kWidth;

// By halves: what adds whole vectors, in an order that no width of them changes.
template <int n>
double pairwise_sum(double (&x)[n]) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

inline double sum_lanes(const FloatVector* v) {
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

// Calls f(element, lane) with lanes that are the same on every instruction set.
template <class T, class F>
MMBAL_HD void for_each_in_lanes(T* x, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(x[i + lane], lane);
  }
  for (int lane = 0; i + lane < count; ++lane) f(x[i + lane], lane);
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

// data[i] <- f(i, data[i]) for whole vectors, the rest through a padded copy.
template <class T, class F>
MMBAL_HD void transform_tail(T* x, int64_t count, F&& f) {
  if (count <= 0) return;
  T padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = i < count ? x[i] : splat_as<T>(0.0f);
  store(padded, f(load(padded)));
  for (int64_t i = 0; i < count; ++i) x[i] = padded[i];
}

}  // namespace
}  // namespace mmbal
