// Arguments of the operations on logits that end in coefficients.
#pragma once

#include "math/dtype.h"
#include "math/modulation.h"

namespace mmbal {

// What of a sample is summed: the probability of what is true, its logarithm from that of 1e-8 on,
// or whether it is the likeliest.
enum class Statistic : int { kProbability = 0, kLogProbability = 1, kAccuracy = 2 };
constexpr int kStatistics = 3;

// What of `state` to derive from the row before it.
struct Derivation {
  float* state;  // [3, M]: scores, ratios, coefficients
  int64_t modalities;
  const float* totals;  // [M + 1], sums and the number of samples: scores are means; or null
  const float* past;    // [M], and the steps that it is made of, for rules that remember; or null
  const int64_t* steps;
  bool ratios;
  float alpha, beta;
  Rule rule;  // kNone leaves the coefficients alone

  MMBAL_HD Balance balance() const {
    return {state, modalities, past, steps ? *steps : 0, alpha, beta, rule};
  }
};

// Scores of M modalities over a batch, and what follows from them.
struct Scores {
  const void* const* logits;  // M pointers to [B, C], rows contiguous
  const DType* dtypes;        // M
  int64_t batch, classes;
  const int64_t* labels;    // [B], or null:
  const void* const* soft;  // M pointers to [B, C] soft labels, in the type of logits[m]
  bool multi_label;         // soft labels are of each class by itself
  int64_t ignore_index;
  Statistic statistic;
  bool accumulate;  // add to the sums that are there
  float* sums;      // [M], or with the number of samples [M + 1] as totals: where they go
  Derivation derivation;
  int32_t* status;  // kLabelOutOfRange is or-ed in; may be null
};

// Takes the scores of a step into what is remembered.
struct Memory {
  float* past;
  int64_t* steps;
  const float* scores;  // [M]; one that is not finite leaves no trace
  const float* totals;  // [M + 1]; without samples there is nothing to remember
  const bool* counts;   // whether the step counts; may be null
  int64_t modalities;
  bool mean;  // of all steps, or the scores as they are

  MMBAL_HD bool takes() const { return totals[modalities] > 0 && (counts == nullptr || *counts); }
  MMBAL_HD void take(int64_t m) const {
    if (!is_finite(scores[m])) return;
    past[m] = mean ? past[m] + (scores[m] - past[m]) / static_cast<float>(*steps + 1) : scores[m];
  }
};

}  // namespace mmbal
