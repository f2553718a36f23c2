// OGM-GE: discrepancy ratios, coefficients and the update g <- k g + N(0, std(g) + eps).
// Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022.
#pragma once

#include "math/moments.h"

namespace mmbal {

enum class Rule : int { kNone = 0, kCvpr2022 = 1, kCvpr2022Excess = 2, kTpami2024 = 3 };
constexpr int kRules = 4;

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

// NaN (no valid label, or two scores of zero) throttles nothing.
MMBAL_HD float modulation_coefficient(float ratio, float alpha, Rule rule) {
  if (!(ratio > 1)) return 1;
  float k = 1;
  if (rule == Rule::kCvpr2022) k = 1 - std::tanh(alpha * ratio);
  if (rule == Rule::kCvpr2022Excess) k = 1 - std::tanh(alpha * (ratio - 1));
  if (rule == Rule::kTpami2024) k = 1 - alpha * std::tanh(ratio - 1);
  if (k != k) return 1;
  return k > 0 ? k : 0;
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

// A coefficient that is NaN throttles nothing.
MMBAL_HD float usable_coefficient(float k) { return k == k ? k : 1.0f; }

}  // namespace
}  // namespace mmbal
