// From scores to coefficients, and the update g <- k g + N(0, std(g) + eps).
// Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022; the
// rules of other papers are named where they stand.
#pragma once

#include "math/moments.h"

namespace mmbal {

enum class Rule : int {
  kNone = 0,
  kCvpr2022 = 1,
  kCvpr2022Excess = 2,
  kTpami2024 = 3,
  kAgm = 4,
  kMlb = 5,
  kMetric = 6
};
constexpr int kRules = 7;

// Bits of the device-side status word.
constexpr int kNonFiniteGradient = 1;
constexpr int kLabelOutOfRange = 2;

namespace {

// rho_m = mean over j != m of S_m / S_j.
MMBAL_HD float discrepancy_ratio(const float* scores, int64_t count, int64_t m) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (j != m) sum += scores[m] / scores[j];
  }
  return sum / static_cast<float>(count - 1);
}

// What a rule makes ratios and coefficients of.
struct Balance {
  const float* scores;  // [count]
  int64_t count;
  const float* past;  // [count], and the number of steps that it is made of: for two rules
  int64_t steps;
  float alpha, beta;
  Rule rule;
};

// AGM (Li et al., ICCV 2023): exp of the mean lead over the others.
MMBAL_HD float lead(const float* scores, int64_t count, int64_t m) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += scores[j];
  const float others = static_cast<float>(count) / static_cast<float>(count - 1);
  return std::exp(others * (scores[m] - sum / static_cast<float>(count)));
}

MMBAL_HD float mean_of_others(const float* scores, int64_t count, int64_t m) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += j == m ? 0 : scores[j];
  return sum / static_cast<float>(count - 1);
}

// Metric modulation (after Guo et al., NeurIPS 2024): share of the sum of all gains; NaN in the
// first step, which has nothing to have gained on.
MMBAL_HD float share_of_gains(const Balance& b, int64_t m) {
  if (b.steps == 0) return NAN;
  float total = 1e-8f;
  for (int64_t j = 0; j < b.count; ++j) total += b.scores[j] - b.past[j];
  return (b.scores[m] - b.past[m]) / total;
}

MMBAL_HD float ratio(const Balance& b, int64_t m) {
  if (b.rule == Rule::kAgm) return lead(b.scores, b.count, m);
  if (b.rule == Rule::kMlb) return b.scores[m] / mean_of_others(b.scores, b.count, m);
  if (b.rule == Rule::kMetric) return static_cast<float>(b.count) * share_of_gains(b, m);
  return discrepancy_ratio(b.scores, b.count, m);
}

// NaN (no valid label, or two scores of zero) throttles nothing.
MMBAL_HD float usable_coefficient(float k) { return k == k ? k : 1.0f; }

MMBAL_HD float throttled(float ratio, float alpha, Rule rule) {
  if (!(ratio > 1)) return 1;
  float k = 1;
  if (rule == Rule::kCvpr2022) k = 1 - std::tanh(alpha * ratio);
  if (rule == Rule::kCvpr2022Excess) k = 1 - std::tanh(alpha * (ratio - 1));
  if (rule == Rule::kTpami2024) k = 1 - alpha * std::tanh(ratio - 1);
  return k > 0 || k != k ? k : 0;
}

MMBAL_HD float coefficient(const Balance& b, int64_t m, float ratio) {
  if (b.rule == Rule::kAgm) {
    const float excess = lead(b.past, b.count, m) - ratio;
    return usable_coefficient(std::exp(b.alpha * (excess > 10 ? 10 : excess)));
  }
  if (b.rule == Rule::kMlb) {  // Kontras et al., BMVC 2024
    const float behind = mean_of_others(b.scores, b.count, m) / b.scores[m] - 1;
    const float push = std::tanh(b.alpha * behind);
    return usable_coefficient(1 + (behind > 0 ? (b.beta - 1) * push : push));
  }
  if (b.rule == Rule::kMetric) {
    const float rest = 1 - share_of_gains(b, m);
    return usable_coefficient(b.alpha * (rest < 0 ? 0 : rest > 1 ? 1 : rest));
  }
  return usable_coefficient(throttled(ratio, b.alpha, b.rule));
}

// Whether a tensor holds numbers only. Its M2 does not say: squares of large ones overflow.
MMBAL_HD bool holds_numbers(const Moments& tensor) { return is_finite(tensor.mean); }

// Scale of the noise added to a tensor that is scaled by k. A tensor that holds NaN or Inf gets
// none, and neither does one that could come near `largest`, its type's largest value: finite
// elements stay finite. (Half saturates instead: its range is too small to stay away from.)
MMBAL_HD double noise_amplitude(const Moments& tensor, double k, double noise, double eps,
                                double largest) {
  const double amplitude = noise * (standard_deviation(tensor.count, tensor.m2) + eps);
  // No element is farther from the mean than sqrt(M2), no normal beyond 6.8.
  const double element = std::fabs(tensor.mean) + std::sqrt(tensor.m2);
  return std::fabs(k) * element + 6.8 * amplitude <= largest ? amplitude : 0.0;
}

}  // namespace
}  // namespace mmbal
