// What one thread does to one row of logits.
#pragma once

#include "operations/scores.h"

namespace mmbal {

// Logits or soft labels of one sample, in a matrix that goes on behind them.
struct Row {
  const void* data;
  int64_t classes;
  int64_t readable;  // elements from here to the end of the matrix
};

struct ScoreKernels {
  // The statistic of the row's softmax at `label`.
  double (*hard[kDTypes])(const Row& row, int64_t label, Statistic statistic);

  // Its mean under the soft labels, of the row's type.
  double (*soft[kDTypes])(const Row& row, const void* labels, Statistic statistic);

  // The same of labels that are each of one class: the mean over the classes.
  double (*multi[kDTypes])(const Row& row, const void* labels, Statistic statistic);
};

}  // namespace mmbal
