// Cross-entropy of rows of logits, and its gradient.
#pragma once

#include "cpu/kernels/cross_entropy.h"
#include "cpu/softmax.h"
#include "math/cross_entropy.h"

namespace mmbal {
namespace {

// Rows of up to so many classes are read kWidth at a time, a row to a lane.
constexpr int64_t kFewClasses = 32;

// Whether the row has a label to learn; a label out of range makes its row NaN instead.
inline bool counted(const Rows& rows, int64_t row) {
  return rows.labels == nullptr || rows.labels[row] != rows.ignore_index;
}
inline bool in_range(const Rows& rows, int64_t row) {
  return rows.labels == nullptr || (rows.labels[row] >= 0 && rows.labels[row] < rows.classes);
}

template <class T>
void fill(T* out, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) out[i] = splat_as<T>(value);
}

template <class A>
const A* soft_row(const Rows& rows, int64_t row) {
  return rows.soft ? static_cast<const A*>(rows.soft) + row * rows.classes : nullptr;
}

// -------------------------------------------------------------------------------- long rows

// Sums of d, q d and q, where they are asked for.
template <class T>
RowSums<float> row_sums(const T* row, const float* soft, float top, int64_t classes) {
  FloatVector all[kRowVectors] = {};
  FloatVector own[kRowVectors] = {};
  FloatVector mass[kRowVectors] = {};
  const FloatVector shift = Simd::splat(top);
  int64_t c = 0;
  for (; c + kRowLanes <= classes; c += kRowLanes) {
    unroll<kRowVectors>([&](auto v) {
      const FloatVector d = load(row + c + v * kWidth) - shift;
      all[v] += d;
      if (soft == nullptr) return;
      const FloatVector q = load(soft + c + v * kWidth);
      own[v] = Simd::fma(q, d, own[v]);
      mass[v] += q;
    });
  }
  double sum[3] = {sum_row_lanes(mass), sum_row_lanes(own), sum_row_lanes(all)};
  for (; c < classes; ++c) {
    const double d = static_cast<float>(to_double(row[c])) - top;
    const double q = soft ? soft[c] : 0.0f;
    sum[0] += q;
    sum[1] += soft ? q * d : 0.0;
    sum[2] += d;
  }
  return {static_cast<float>(sum[0]), static_cast<float>(sum[1]), static_cast<float>(sum[2])};
}

inline RowSums<double> row_sums(const double* row, const double* soft, double top,
                                int64_t classes) {
  RowSums<double> sums{0, 0, 0};
  for (int64_t c = 0; c < classes; ++c) {
    const double d = row[c] - top;
    sums.all += d;
    if (soft == nullptr) continue;
    sums.mass += soft[c];
    sums.own += soft[c] * d;
  }
  return sums;
}

template <class T>
double sum_of_exponentials(const T* row, float top, int64_t classes) {
  const FloatVector shift = Simd::splat(top);
  FloatVector sum[kRowVectors] = {};
  for_each_logit(row, classes, classes, [&](const FloatVector* x) {
    unroll<kRowVectors>([&](auto v) { sum[v] += exp_nonpositive<Simd>(x[v] - shift); });
  });
  return sum_row_lanes(sum);
}

inline double sum_of_exponentials(const double* row, double top, int64_t classes) {
  double sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += std::exp(row[c] - top);
  return sum;
}

// Loss of one row whose label is in range.
template <class A, class T>
double long_row_loss(const Rows& rows, int64_t r, A* top, A* log_sum) {
  const T* row = static_cast<const T*>(rows.logits) + r * rows.classes;
  *top = row_max(row, rows.classes, rows.classes);
  *log_sum = static_cast<A>(std::log(sum_of_exponentials(row, *top, rows.classes)));
  const A* soft = soft_row<A>(rows, r);
  RowSums<A> sums{1, 0, 0};
  if (soft || rows.smoothing > 0) sums = row_sums(row, soft, *top, rows.classes);
  if (soft == nullptr) {
    sums.mass = 1;
    sums.own = static_cast<A>(to_double(row[rows.labels[r]])) - *top;
  }
  return row_loss(*log_sum, sums, static_cast<A>(rows.smoothing), static_cast<A>(rows.classes));
}

template <class T>
void long_row_gradient(const Rows& rows, int64_t r, float top, float log_sum, float scale, T* out) {
  const T* row = static_cast<const T*>(rows.logits) + r * rows.classes;
  const float* soft = soft_row<float>(rows, r);
  const auto classes = static_cast<float>(rows.classes);
  const auto smoothing = static_cast<float>(rows.smoothing);
  float mass = 1;
  if (soft) {
    double sum = 0;
    for (int64_t c = 0; c < rows.classes; ++c) sum += soft[c];
    mass = static_cast<float>(sum);
  }
  const RowGradient<float> gradient(scale, mass, smoothing, classes);
  const FloatVector shift = Simd::splat(top);
  const FloatVector log = Simd::splat(log_sum);
  const FloatVector factor = Simd::splat(gradient.softmax);
  const FloatVector uniform = Simd::splat(gradient.uniform);
  const auto of = [&](FloatVector x) {
    return Simd::fma(factor, exp_nonpositive<Simd>(x - shift - log), -uniform);
  };
  int64_t c = 0;
  for (; c + kWidth <= rows.classes; c += kWidth) {
    FloatVector g = of(load(row + c));
    if (soft) g -= Simd::splat(gradient.label) * load(soft + c);
    store(out + c, g);
  }
  for (; c < rows.classes; ++c) {
    const float x = static_cast<float>(to_double(row[c]));
    float g = gradient.softmax * exp_nonpositive<Scalar>(x - top - log_sum) - gradient.uniform;
    if (soft) g -= gradient.label * soft[c];
    out[c] = splat_as<T>(g);
  }
  if (soft) return;
  const int64_t label = rows.labels[r];
  const float x = static_cast<float>(to_double(row[label]));
  const float softmax = exp_nonpositive<Scalar>(x - top - log_sum);
  out[label] = splat_as<T>(gradient.softmax * softmax - gradient.uniform - gradient.label);
}

inline void long_row_gradient(const Rows& rows, int64_t r, double top, double log_sum, double scale,
                              double* out) {
  const double* row = static_cast<const double*>(rows.logits) + r * rows.classes;
  const double* soft = soft_row<double>(rows, r);
  double mass = soft ? 0 : 1;
  for (int64_t c = 0; soft && c < rows.classes; ++c) mass += soft[c];
  const RowGradient<double> gradient(scale, mass, rows.smoothing,
                                     static_cast<double>(rows.classes));
  for (int64_t c = 0; c < rows.classes; ++c) {
    out[c] = gradient.softmax * std::exp(row[c] - top - log_sum) - gradient.uniform;
    if (soft) out[c] -= gradient.label * soft[c];
  }
  if (soft == nullptr) out[rows.labels[r]] -= gradient.label;
}

// ------------------------------------------------------------------------------- short rows

using Columns = float[kFewClasses * kWidth];

// columns[c * kWidth + i] = rows[i, c]; where there are less than kWidth rows, the last again.
template <class T>
void transpose(const T* rows, int64_t count, int64_t classes, Columns& columns) {
  for (int64_t i = 0; i < kWidth; ++i) {
    const T* row = rows + (i < count ? i : count - 1) * classes;
    for (int64_t c = 0; c < classes; ++c) {
      columns[c * kWidth + i] = static_cast<float>(to_double(row[c]));
    }
  }
}

// Sum of the losses of `count` rows from `first` on, at most kWidth.
template <class T>
double short_rows_loss(const Rows& rows, int64_t first, int64_t count, float* tops,
                       float* log_sums) {
  const int64_t classes = rows.classes;
  Columns columns, labels;
  transpose(static_cast<const T*>(rows.logits) + first * classes, count, classes, columns);
  if (rows.soft) transpose(soft_row<float>(rows, first), count, classes, labels);
  FloatVector top = load(columns);
  for (int64_t c = 1; c < classes; ++c) top = Simd::max(top, load(columns + c * kWidth));
  FloatVector sum{}, all{}, own{}, mass{};
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVector d = load(columns + c * kWidth) - top;
    sum += exp_nonpositive<Simd>(d);
    all += d;
    if (rows.soft == nullptr) continue;
    const FloatVector q = load(labels + c * kWidth);
    own = Simd::fma(q, d, own);
    mass += q;
  }
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    tops[r] = counted(rows, r) ? top[i] : 0.0f;
    log_sums[r] = counted(rows, r) ? std::log(sum[i]) : 0.0f;
    if (!counted(rows, r)) continue;
    if (!in_range(rows, r)) return NAN;
    RowSums<float> sums{mass[i], own[i], all[i]};
    if (rows.soft == nullptr) {
      sums.mass = 1;
      sums.own = columns[rows.labels[r] * kWidth + i] - top[i];
    }
    total += row_loss(log_sums[r], sums, static_cast<float>(rows.smoothing),
                      static_cast<float>(classes));
  }
  return total;
}

template <class T>
void short_rows_gradient(const Rows& rows, int64_t first, int64_t count, const float* tops,
                         const float* log_sums, float scale, T* out) {
  const int64_t classes = rows.classes;
  Columns columns, labels;
  transpose(static_cast<const T*>(rows.logits) + first * classes, count, classes, columns);
  FloatVector mass = Simd::splat(1.0f);
  if (rows.soft) {
    transpose(soft_row<float>(rows, first), count, classes, labels);
    mass = FloatVector{};
    for (int64_t c = 0; c < classes; ++c) mass += load(labels + c * kWidth);
  }
  FloatVector top{}, log_sum{};
  for (int64_t i = 0; i < count; ++i) {
    top[i] = tops[first + i];
    log_sum[i] = log_sums[first + i];
  }
  const RowGradient<FloatVector> gradient(Simd::splat(scale), mass,
                                          Simd::splat(static_cast<float>(rows.smoothing)),
                                          Simd::splat(static_cast<float>(classes)));
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVector d = load(columns + c * kWidth) - top - log_sum;
    FloatVector g = Simd::fma(gradient.softmax, exp_nonpositive<Simd>(d), -gradient.uniform);
    if (rows.soft) g -= gradient.label * load(labels + c * kWidth);
    store(columns + c * kWidth, g);
  }
  for (int64_t i = 0; i < count; ++i, out += classes) {
    const int64_t r = first + i;
    if (!counted(rows, r) || !in_range(rows, r)) {
      fill(out, classes, counted(rows, r) ? NAN : 0.0f);
      continue;
    }
    if (rows.soft == nullptr) columns[rows.labels[r] * kWidth + i] -= gradient.label[0];
    for (int64_t c = 0; c < classes; ++c) out[c] = splat_as<T>(columns[c * kWidth + i]);
  }
}

// ------------------------------------------------------------------------------- any rows

// Sum of the losses of rows [first, end); their normalizers to rows.top and rows.log_sum.
template <class T>
double cross_entropy(const Rows& rows, int64_t first, int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  A* top = static_cast<A*>(rows.top);
  A* log_sum = static_cast<A*>(rows.log_sum);
  double total = 0;
  if constexpr (!std::is_same_v<T, double>) {
    if (rows.classes <= kFewClasses) {
      for (int64_t r = first; r < end; r += kWidth) {
        const int64_t count = end - r < kWidth ? end - r : kWidth;
        total += short_rows_loss<T>(rows, r, count, top, log_sum);
      }
      return total;
    }
  }
  for (int64_t r = first; r < end; ++r) {
    if (!counted(rows, r) || !in_range(rows, r)) {
      if (counted(rows, r)) total = NAN;
      top[r] = log_sum[r] = 0;
      continue;
    }
    total += long_row_loss<A, T>(rows, r, top + r, log_sum + r);
  }
  return total;
}

// Gradients of rows [first, end) to the same rows of `data`; `scale` is that of a row's loss.
template <class T>
void cross_entropy_gradient(const Rows& rows, int64_t first, int64_t end, double scale,
                            void* data) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const A* top = static_cast<const A*>(rows.top);
  const A* log_sum = static_cast<const A*>(rows.log_sum);
  T* out = static_cast<T*>(data) + first * rows.classes;
  const A factor = static_cast<A>(scale);
  if constexpr (!std::is_same_v<T, double>) {
    if (rows.classes <= kFewClasses) {
      for (int64_t r = first; r < end; r += kWidth, out += kWidth * rows.classes) {
        const int64_t count = end - r < kWidth ? end - r : kWidth;
        short_rows_gradient(rows, r, count, top, log_sum, factor, out);
      }
      return;
    }
  }
  for (int64_t r = first; r < end; ++r, out += rows.classes) {
    if (counted(rows, r) && in_range(rows, r)) {
      long_row_gradient(rows, r, top[r], log_sum[r], factor, out);
    } else {
      fill(out, rows.classes, counted(rows, r) ? NAN : 0.0f);
    }
  }
}

}  // namespace
}  // namespace mmbal
