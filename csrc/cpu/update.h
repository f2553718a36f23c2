// Gradients scaled, with and without noise, in place.
#pragma once

#include "cpu/noise.h"

namespace mmbal {
namespace {

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
inline void scale_and_add_noise<double>(void* data, int64_t count, double k, double amplitude,
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
inline bool scale<double>(void* data, int64_t count, double k) {
  double* x = static_cast<double*>(data);
  double finite[kLanes] = {};
  for_each_in_lanes(x, count, [&](double& value, int lane) {
    finite[lane] += value * 0.0;
    if (k != 1) value *= k;
  });
  return pairwise_sum(finite) == 0;
}

}  // namespace
}  // namespace mmbal
