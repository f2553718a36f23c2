// What the softmax of a row of logits is made of.
#pragma once

#include "cpu/lanes.h"
#include "math/softmax.h"

namespace mmbal {
namespace {

constexpr int kRowLanes = 16;
constexpr int kRowVectors = kRowLanes / kWidth;

// kRowLanes elements of a row from c on, with `filler` behind its end. From the row's beginning
// `readable` elements may be read.
template <class T>
MMBAL_HD void load_row(const T* row, int64_t c, int64_t classes, int64_t readable, float filler,
                       FloatVector* x) {
  if (c + kRowLanes <= classes) {
    unroll<kRowVectors>([&](auto v) { x[v] = load(row + c + v * kWidth); });
    return;
  }
  if (c + kRowLanes <= readable) {  // what is behind the end is another row's
    constexpr uint32_t a = ~0u;
    static constexpr uint32_t kPast[2 * kRowLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                      0, 0, 0, 0, 0, a, a, a, a, a, a,
                                                      a, a, a, a, a, a, a, a, a, a};
    const uint32_t* past = kPast + kRowLanes - (classes - c);
    unroll<kRowVectors>([&](auto v) {
      UintVector mask;
      std::memcpy(&mask, past + v * kWidth, sizeof mask);
      x[v] = Simd::select(mask, load(row + c + v * kWidth), Simd::splat(filler));
    });
    return;
  }
  T padded[kRowLanes];
  for (int i = 0; i < kRowLanes; ++i) {
    padded[i] = c + i < classes ? row[c + i] : splat_as<T>(filler);
  }
  unroll<kRowVectors>([&](auto v) { x[v] = load(padded + v * kWidth); });
}

// Calls f(vectors) for every kRowLanes logits of a row, the last ones padded with -inf.
template <class T, class F>
MMBAL_HD void for_each_logit(const T* row, int64_t classes, int64_t readable, F&& f) {
  FloatVector x[kRowVectors];
  for (int64_t c = 0; c < classes; c += kRowLanes) {
    load_row(row, c, classes, readable, -HUGE_VALF, x);
    f(x);
  }
}

template <class T>
float row_max(const T* row, int64_t classes, int64_t readable) {
  FloatVector top[kRowVectors];
  unroll<kRowVectors>([&](auto v) { top[v] = Simd::splat(-HUGE_VALF); });
  for_each_logit(row, classes, readable, [&](const FloatVector* x) {
    unroll<kRowVectors>([&](auto v) { top[v] = Simd::max(top[v], x[v]); });
  });
  float lanes[kRowLanes];
  unroll<kRowVectors>([&](auto v) { store(lanes + v * kWidth, top[v]); });
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
}

inline double row_max(const double* row, int64_t classes, int64_t) {
  double top = row[0];
  for (int64_t c = 1; c < classes; ++c) top = row[c] > top ? row[c] : top;
  return top;
}

inline double sum_row_lanes(const FloatVector* v) {
  float lanes[kRowLanes];
  double wide[kRowLanes];
  unroll<kRowVectors>([&](auto j) { store(lanes + j * kWidth, v[j]); });
  for (int i = 0; i < kRowLanes; ++i) wide[i] = lanes[i];
  return pairwise_sum(wide);
}

}  // namespace
}  // namespace mmbal
