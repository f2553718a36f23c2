// What one thread does to one row of logits.
#pragma once

#include "math/dtype.h"

namespace mmbal {

struct ScoreKernels {
  // Softmax of the row at `label`.
  double (*hard[kDTypes])(const void* row, int64_t classes, int64_t label);

  // Its mean under the soft labels in `weights`, of the row's type.
  double (*soft[kDTypes])(const void* row, int64_t classes, const void* weights);
};

}  // namespace mmbal
