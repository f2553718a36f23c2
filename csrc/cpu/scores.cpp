#include "operations/scores.h"

#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels/scores.h"
#include "cpu/parallel.h"
#include "device.h"

namespace mmbal {

template <>
void derive(const Derivation& args, const Cpu&) {
  float* ratios = args.state + args.modalities;
  float* coefficients = ratios + args.modalities;
  for (int64_t m = 0; m < args.modalities; ++m) {
    if (args.ratios) ratios[m] = discrepancy_ratio(args.state, args.modalities, m);
    if (args.rule != Rule::kNone) {
      coefficients[m] = modulation_coefficient(ratios[m], args.alpha, args.rule);
    }
  }
}

template <>
void score(const Scores& args, const Cpu& cpu) {
  static thread_local std::vector<double> memory;
  const auto& table = kernels<ScoreKernels>();
  std::vector<double>& row_scores = memory;  // the caller's, also in the other threads
  const int64_t rows = args.modalities * args.batch;
  row_scores.assign(static_cast<size_t>(rows), 0.0);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, args.classes));
  std::atomic<bool> in_range{true};
  const int64_t work = rows * (args.classes + 32);  // a row's sums take as long as 32 more
  parallel_for(rows, grain, useful_threads(work, cpu.threads), [&](int64_t i) {
    const int64_t m = i / args.batch;
    const int64_t b = i % args.batch;
    const int64_t at = b * args.classes * size_of(args.dtypes[m]);
    const char* row = static_cast<const char*>(args.logits[m]) + at;
    const int dtype = static_cast<int>(args.dtypes[m]);
    if (args.labels == nullptr) {
      row_scores[i] =
          table.soft[dtype](row, args.classes, static_cast<const char*>(args.soft[m]) + at);
    } else if (args.labels[b] == args.ignore_index) {
      return;
    } else if (args.labels[b] >= 0 && args.labels[b] < args.classes) {
      row_scores[i] = table.hard[dtype](row, args.classes, args.labels[b]);
    } else {
      in_range = false;
    }
  });
  if (!in_range && args.status) *args.status |= kLabelOutOfRange;
  for (int64_t m = 0; m < args.modalities; ++m) {
    double sum = 0;
    for (int64_t b = 0; b < args.batch; ++b) sum += row_scores[m * args.batch + b];
    args.state[m] = (args.accumulate ? args.state[m] : 0.0f) + static_cast<float>(sum);
  }
  derive(Derivation{args.state, args.modalities, true, args.alpha, args.rule}, cpu);
}

}  // namespace mmbal
