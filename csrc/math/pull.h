// InfoReg: a gradient with a pull towards earlier weights, g + beta (theta - anchor).
// Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition",
// CVPR 2025.
#pragma once

#include "math/platform.h"

namespace mmbal {
namespace {

template <class V>
MMBAL_HD typename V::F pulled(typename V::F g, typename V::F theta, typename V::F anchor,
                              typename V::F beta) {
  return V::fma(beta, theta - anchor, g);
}

// Whether there is a pull. A coefficient that is NaN has none.
MMBAL_HD bool pulls(float beta) { return beta == beta && beta != 0; }

}  // namespace
}  // namespace mmbal
