// Arguments of the features that are dropped before a fusion, forward and backward.
#pragma once

#include "math/dropping.h"
#include "math/dtype.h"
#include "operations/gradients.h"

namespace mmbal {

// Rows of M modalities, [batch, width] each, and where they go, scaled.
struct FeatureRows {
  const void* const* from;
  void* const* to;
  const int64_t* widths;
  const DType* dtypes;
  int64_t modalities, batch;
};

// Numbers of the whole step; every sample then has draws of its own.
struct Dropping {
  const float* ratios;  // [M]
  double base, strength, apply;
  NoiseSource source;
  uint32_t stream;  // of the first modality; 0 is the batch's own draw

  MMBAL_HD NoiseKey key(uint32_t stream_id) const {
    const int64_t step = source.step_pointer ? *source.step_pointer : source.step;
    return {source.seed, static_cast<uint32_t>(step), stream_id};
  }
  MMBAL_HD float probability(int64_t m) const {
    if (!drawn_below(key(0), 0, apply)) return 0;
    return drop_probability(ratios[m], base, strength);
  }
  MMBAL_HD bool drops(int64_t m, int64_t sample, float q) const {
    const auto own = static_cast<uint32_t>(stream + static_cast<uint64_t>(m));
    return q > 0 && drawn_below(key(own), static_cast<uint64_t>(sample), q);
  }
};

struct DropFeatures {
  FeatureRows rows;
  Dropping dropping;
  float* probabilities;  // [M]
  float* factors;        // [M, batch]: 0, or 1 over what is kept on average
  void* weight;          // [batch]: 0 where a sample lost every modality, else 1
  DType weight_dtype;
  int64_t* advance;  // step counter incremented at the end; may be null
};

struct DropFeaturesBackward {
  FeatureRows rows;      // gradients
  const float* factors;  // [M, batch]
};

}  // namespace mmbal
