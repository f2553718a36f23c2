// Arguments of the operations on logits that end in coefficients.
#pragma once

#include "math/dtype.h"
#include "math/modulation.h"

namespace mmbal {

// Softmax scores of M modalities over a batch, and what follows from them.
struct Scores {
  const void* const* logits;  // M pointers to [B, C], rows contiguous
  const DType* dtypes;        // M
  int64_t modalities, batch, classes;
  const int64_t* labels;    // [B], or null:
  const void* const* soft;  // M pointers to [B, C] soft labels, in the type of logits[m]
  int64_t ignore_index;
  bool accumulate;  // add to the scores already in state
  float* state;     // [3, M]: scores, ratios, coefficients
  float alpha;
  Rule rule;        // kNone leaves the coefficients alone
  int32_t* status;  // kLabelOutOfRange is or-ed in; may be null
};

// What of `state` to derive from the row before it.
struct Derivation {
  float* state;  // [3, M]
  int64_t modalities;
  bool ratios;
  float alpha;
  Rule rule;
};

}  // namespace mmbal
