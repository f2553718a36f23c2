// Dots and squares of a chunk, in float64.
#pragma once

#include "cpu/lanes.h"
#include "math/dots.h"

namespace mmbal {
namespace {

// Running sums, the same on every instruction set: as many as 3 of them leave registers for.
constexpr int kDotLanes = 16;

// Up to kDotLanes elements as numbers; those of 16 bits are converted all at once.
template <class T>
struct Widened {
  const T* x;

  MMBAL_HD Widened(const T* data, int64_t) : x(data) {}
  MMBAL_HD double operator[](int64_t i) const { return to_double(x[i]); }
};
template <class T>
struct WidenedHalves {
  float x[kDotLanes];

  MMBAL_HD WidenedHalves(const T* data, int64_t count) {
    if (count == kDotLanes) {
      for (int i = 0; i < kDotLanes; i += kWidth) store(x + i, load(data + i));
    } else {
      for (int64_t i = 0; i < count; ++i) x[i] = to_float(data[i]);
    }
  }
  MMBAL_HD double operator[](int64_t i) const { return x[i]; }
};
template <>
struct Widened<Half> : WidenedHalves<Half> {
  using WidenedHalves::WidenedHalves;
};
template <>
struct Widened<BFloat16> : WidenedHalves<BFloat16> {
  using WidenedHalves::WidenedHalves;
};

// Calls add(lane, x[i] ...) for all i.
template <class Add, class... T>
MMBAL_HD void for_each_in_double(int64_t count, Add&& add, const T*... x) {
  const auto add_lanes = [&](int64_t lanes, const auto&... values) {
    for (int64_t lane = 0; lane < lanes; ++lane) add(lane, values[lane]...);
  };
  int64_t i = 0;
  for (; i + kDotLanes <= count; i += kDotLanes) {
    add_lanes(kDotLanes, Widened<T>(x + i, kDotLanes)...);
  }
  add_lanes(count - i, Widened<T>(x + i, count - i)...);
}

template <class T>
Dots dots(const void* first, const void* second, int64_t count) {
  double sums[3][kDotLanes] = {};
  for_each_in_double(
      count,
      [&](int64_t lane, double u, double v) {
        sums[0][lane] += u * u;
        sums[1][lane] += u * v;
        sums[2][lane] += v * v;
      },
      static_cast<const T*>(first), static_cast<const T*>(second));
  return {pairwise_sum(sums[0]), pairwise_sum(sums[1]), pairwise_sum(sums[2])};
}

template <class T>
double squares(const T* x, int64_t count) {
  double sums[kDotLanes] = {};
  for_each_in_double(count, [&](int64_t lane, double u) { sums[lane] += u * u; }, x);
  return pairwise_sum(sums);
}

}  // namespace
}  // namespace mmbal
