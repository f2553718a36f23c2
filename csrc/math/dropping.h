// OPM: features of a modality that dominates are dropped for some samples.
// Wei, Hu, Du, Wen, "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024.
#pragma once

#include "math/philox.h"

namespace mmbal {
namespace {

// Probability that a sample's features are dropped. In float64, so that all libraries round alike.
MMBAL_HD float drop_probability(float ratio, double base, double strength) {
  if (!(ratio > 1)) return 0;
  const double q = base * (1 + strength * std::tanh(static_cast<double>(ratio) - 1));
  return static_cast<float>(q > 1 ? 1 : q);
}

// Whether element `index` of a stream comes out below a probability.
MMBAL_HD bool drawn_below(const NoiseKey& key, uint64_t index, double probability) {
  const uint64_t block = index >> 2;
  const Words<uint32_t> words =
      noise_words<Scalar>(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32));
  const auto lane = static_cast<int>(index & 3);
  const uint32_t word = lane == 0   ? words.w0
                        : lane == 1 ? words.w1
                        : lane == 2 ? words.w2
                                    : words.w3;
  return (word + 0.5) * 0x1p-32 < probability;
}

}  // namespace
}  // namespace mmbal
