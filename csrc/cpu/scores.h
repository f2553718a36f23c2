// Statistics of one row of logits, at a label or under soft labels.
#pragma once

#include "cpu/kernels/scores.h"
#include "cpu/softmax.h"

namespace mmbal {
namespace {

template <class T>
const T* logits_of(const Row& row) {
  return static_cast<const T*>(row.data);
}

// Calls f(logits, labels) for every kRowLanes of a row, those behind its end -inf and `filler`.
template <class T, class F>
MMBAL_HD void for_each_label(const Row& row, const void* labels, float filler, F&& f) {
  FloatVector x[kRowVectors];
  FloatVector q[kRowVectors];
  for (int64_t c = 0; c < row.classes; c += kRowLanes) {
    load_row(logits_of<T>(row), c, row.classes, row.readable, -HUGE_VALF, x);
    load_row(static_cast<const T*>(labels), c, row.classes, row.readable, filler, q);
    f(x, q);
  }
}

// Whether a label is the likeliest class, of equal ones the first. Not in a row with NaN.
template <class T>
double is_likeliest(const Row& row, int64_t label) {
  const T* x = logits_of<T>(row);
  const double own = to_double(x[label]);
  bool likeliest = own == own;
  for (int64_t c = 0; c < label; ++c) likeliest &= to_double(x[c]) < own;
  for (int64_t c = label + 1; c < row.classes; ++c) likeliest &= to_double(x[c]) <= own;
  return likeliest;
}

template <class T>
int64_t likeliest(const void* labels, int64_t classes) {
  const T* q = static_cast<const T*>(labels);
  int64_t best = 0;
  for (int64_t c = 1; c < classes; ++c) {
    if (to_double(q[c]) > to_double(q[best])) best = c;
  }
  return best;
}

template <class T>
double hard_score(const Row& row, int64_t label, Statistic statistic) {
  if (statistic == Statistic::kAccuracy) return is_likeliest<T>(row, label);
  const T* x = logits_of<T>(row);
  const float top = row_max(x, row.classes, row.readable);
  const FloatVector shift = Simd::splat(top);
  FloatVector sum[kRowVectors] = {};
  for_each_logit(x, row.classes, row.readable, [&](const FloatVector* logits) {
    unroll<kRowVectors>([&](auto v) { sum[v] += exp_nonpositive<Simd>(logits[v] - shift); });
  });
  const float own = static_cast<float>(to_double(x[label])) - top;
  const double all = sum_row_lanes(sum);
  if (statistic == Statistic::kLogProbability) return floored(own - std::log(all));
  return exp_nonpositive<Scalar>(own) / all;
}

template <class T>
double soft_score(const Row& row, const void* labels, Statistic statistic) {
  if (statistic == Statistic::kAccuracy) {
    return is_likeliest<T>(row, likeliest<T>(labels, row.classes));
  }
  const FloatVector shift = Simd::splat(row_max(logits_of<T>(row), row.classes, row.readable));
  FloatVector sum[kRowVectors] = {};
  FloatVector weighted[kRowVectors] = {};
  for_each_label<T>(row, labels, 0.0f, [&](const FloatVector* x, const FloatVector* q) {
    unroll<kRowVectors>([&](auto v) {
      const FloatVector e = exp_nonpositive<Simd>(x[v] - shift);
      sum[v] += e;
      weighted[v] = Simd::fma(e, q[v], weighted[v]);
    });
  });
  const double all = sum_row_lanes(sum);
  if (statistic == Statistic::kProbability) return sum_row_lanes(weighted) / all;
  const FloatVector log_all = Simd::splat(static_cast<float>(std::log(all)));
  const FloatVector floor = Simd::splat(static_cast<float>(kLogFloor));
  FloatVector logs[kRowVectors] = {};
  for_each_label<T>(row, labels, 0.0f, [&](const FloatVector* x, const FloatVector* q) {
    unroll<kRowVectors>([&](auto v) {
      logs[v] = Simd::fma(Simd::max(floor, x[v] - shift - log_all), q[v], logs[v]);
    });
  });
  return sum_row_lanes(logs);
}

template <class T>
double multi_label_score(const Row& row, const void* labels, Statistic statistic) {
  const FloatVector one = Simd::splat(1.0f);
  FloatVector sum[kRowVectors] = {};
  double logs = 0;
  // Behind the end there is a certain label of a logit of -inf, which has no probability.
  for_each_label<T>(row, labels, 1.0f, [&](const FloatVector* x, const FloatVector* q) {
    unroll<kRowVectors>([&](auto v) {
      FloatVector up, down;
      sigmoids<Simd>(x[v], up, down);
      sum[v] += Simd::fma(q[v], up, (one - q[v]) * down);
    });
  });
  const auto classes = static_cast<double>(row.classes);
  if (statistic == Statistic::kProbability) return sum_row_lanes(sum) / classes;
  const T* x = logits_of<T>(row);
  const T* q = static_cast<const T*>(labels);
  for (int64_t c = 0; c < row.classes; ++c) {
    const double weight = to_double(q[c]);
    const auto logit = static_cast<float>(to_double(x[c]));
    if (statistic == Statistic::kAccuracy) {
      logs += logit == logit && (logit > 0) == (weight > 0.5);
      continue;
    }
    float up, down;
    sigmoids<Scalar>(logit, up, down);
    logs += weight * floored(std::log(static_cast<double>(up))) +
            (1 - weight) * floored(std::log(static_cast<double>(down)));
  }
  return logs / classes;
}

// float64 rows, with weights q or none.
inline double double_row_sum(const Row& row, const double* q, double* top, double* own) {
  const auto* x = logits_of<double>(row);
  *top = row_max(x, row.classes, row.readable);
  double sum = 0;
  for (int64_t c = 0; c < row.classes; ++c) {
    const double e = std::exp(x[c] - *top);
    sum += e;
    if (q) *own += e * q[c];
  }
  return sum;
}

template <>
inline double hard_score<double>(const Row& row, int64_t label, Statistic statistic) {
  if (statistic == Statistic::kAccuracy) return is_likeliest<double>(row, label);
  double top;
  const double sum = double_row_sum(row, nullptr, &top, nullptr);
  const double own = logits_of<double>(row)[label] - top;
  if (statistic == Statistic::kLogProbability) return floored(own - std::log(sum));
  return std::exp(own) / sum;
}

template <>
inline double soft_score<double>(const Row& row, const void* labels, Statistic statistic) {
  const auto* q = static_cast<const double*>(labels);
  if (statistic == Statistic::kAccuracy) {
    return is_likeliest<double>(row, likeliest<double>(labels, row.classes));
  }
  double top;
  double own = 0;
  const double sum = double_row_sum(row, q, &top, &own);
  if (statistic == Statistic::kProbability) return own / sum;
  const auto* x = logits_of<double>(row);
  double logs = 0;
  for (int64_t c = 0; c < row.classes; ++c) logs += floored(x[c] - top - std::log(sum)) * q[c];
  return logs;
}

template <>
inline double multi_label_score<double>(const Row& row, const void* labels, Statistic statistic) {
  const auto* x = logits_of<double>(row);
  const auto* q = static_cast<const double*>(labels);
  double sum = 0;
  for (int64_t c = 0; c < row.classes; ++c) {
    if (statistic == Statistic::kAccuracy) {
      sum += x[c] == x[c] && (x[c] > 0) == (q[c] > 0.5);
      continue;
    }
    const double up = 1 / (1 + std::exp(-x[c]));
    const double down = 1 / (1 + std::exp(x[c]));
    sum += statistic == Statistic::kProbability
               ? q[c] * up + (1 - q[c]) * down
               : q[c] * floored(std::log(up)) + (1 - q[c]) * floored(std::log(down));
  }
  return sum / static_cast<double>(row.classes);
}

}  // namespace
}  // namespace mmbal
