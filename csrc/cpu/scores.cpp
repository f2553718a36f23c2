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
  const int64_t count = args.modalities;
  float* ratios = args.state + count;
  float* coefficients = ratios + count;
  if (args.totals) {
    for (int64_t m = 0; m < count; ++m) args.state[m] = args.totals[m] / args.totals[count];
  }
  const Balance balance = args.balance();
  for (int64_t m = 0; m < count; ++m) {
    if (args.ratios) ratios[m] = ratio(balance, m);
    if (args.rule != Rule::kNone) coefficients[m] = coefficient(balance, m, ratios[m]);
  }
}

template <>
void remember(const Memory& args, const Cpu&) {
  if (!args.takes()) return;
  for (int64_t m = 0; m < args.modalities; ++m) args.take(m);
  ++*args.steps;
}

template <>
void score(const Scores& args, const Cpu& cpu) {
  static thread_local std::vector<double> memory;
  const auto& table = kernels<ScoreKernels>();
  const int64_t modalities = args.derivation.modalities;
  std::vector<double>& row_scores = memory;  // the caller's, also in the other threads
  const int64_t rows = modalities * args.batch;
  row_scores.assign(static_cast<size_t>(rows), 0.0);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, args.classes));
  std::atomic<bool> in_range{true};
  const int64_t work = rows * (args.classes + 32);  // a row's sums take as long as 32 more
  const auto counted = [&](int64_t b) { return args.labels[b] != args.ignore_index; };
  const auto valid = [&](int64_t b) {
    return args.labels[b] >= 0 && args.labels[b] < args.classes;
  };
  parallel_for(rows, grain, useful_threads(work, cpu.threads), [&](int64_t i) {
    const int64_t m = i / args.batch;
    const int64_t b = i % args.batch;
    const int64_t at = b * args.classes * size_of(args.dtypes[m]);
    const Row row{static_cast<const char*>(args.logits[m]) + at, args.classes,
                  (args.batch - b) * args.classes};
    const int dtype = static_cast<int>(args.dtypes[m]);
    if (args.labels == nullptr) {
      const auto& kernel = args.multi_label ? table.multi : table.soft;
      const char* labels = static_cast<const char*>(args.soft[m]) + at;
      row_scores[i] = kernel[dtype](row, labels, args.statistic);
    } else if (!counted(b)) {
      return;
    } else if (valid(b)) {
      row_scores[i] = table.hard[dtype](row, args.labels[b], args.statistic);
    } else {
      in_range = false;
    }
  });
  if (!in_range && args.status) *args.status |= kLabelOutOfRange;
  const auto put = [&](int64_t i, double sum) {
    args.sums[i] = (args.accumulate ? args.sums[i] : 0.0f) + static_cast<float>(sum);
  };
  for (int64_t m = 0; m < modalities; ++m) {
    double sum = 0;
    for (int64_t b = 0; b < args.batch; ++b) sum += row_scores[m * args.batch + b];
    put(m, sum);
  }
  if (args.derivation.totals) {
    int64_t samples = args.batch;
    for (int64_t b = 0; args.labels && b < args.batch; ++b) samples -= !counted(b) || !valid(b);
    put(modalities, static_cast<double>(samples));
  }
  derive(args.derivation, cpu);
}

}  // namespace mmbal
