#include "operations/cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels/cross_entropy.h"
#include "cpu/parallel.h"
#include "device.h"

namespace mmbal {
namespace {

// Rows of one head that a thread takes at a time: a multiple of every vector's width if rows are
// short, and never dependent on the number of threads, so that sums are not either.
struct Blocks {
  int64_t rows, per_head, count;

  explicit Blocks(const CrossEntropy& args) {
    rows = kChunk / args.classes;
    rows = rows >= 64 ? rows / 64 * 64 : std::max<int64_t>(1, rows);
    per_head = (args.rows + rows - 1) / rows;
    count = args.heads * per_head;
  }
};

Rows rows_of(const CrossEntropy& args, int64_t head) {
  const int64_t size = args.wide() ? 8 : 4;
  char* normalizers = static_cast<char*>(args.normalizers) + head * args.rows * size;
  return {
      args.logits[head], args.classes,   args.labels, args.soft,
      args.ignore_index, args.smoothing, normalizers, normalizers + args.heads * args.rows * size};
}

void write(void* out, int64_t i, double value, bool wide) {
  if (wide) {
    static_cast<double*>(out)[i] = value;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(value);
  }
}

// Calls f(block, head, first row, last row + 1) for each block, on any thread.
template <class F>
void for_each_block(const CrossEntropy& args, const Blocks& blocks, int threads, F&& f) {
  const int useful = useful_threads(args.heads * args.rows * args.classes, threads);
  parallel_for(blocks.count, 1, useful, [&](int64_t i) {
    const int64_t first = i % blocks.per_head * blocks.rows;
    f(i, i / blocks.per_head, first, std::min(args.rows, first + blocks.rows));
  });
}

}  // namespace

template <>
void cross_entropy(const CrossEntropy& args, const Cpu& cpu) {
  static thread_local std::vector<double> memory;
  const auto& table = kernels<CrossEntropyKernels>();
  const Blocks blocks(args);
  std::vector<double>& sums = memory;  // the caller's, also in the other threads
  sums.assign(static_cast<size_t>(blocks.count), 0.0);
  for_each_block(
      args, blocks, cpu.threads, [&](int64_t i, int64_t head, int64_t first, int64_t end) {
        sums[i] = table.loss[static_cast<int>(args.dtypes[head])](rows_of(args, head), first, end);
      });
  *args.count = args.rows;
  if (args.labels) {
    *args.count = std::count_if(args.labels, args.labels + args.rows,
                                [&](int64_t label) { return label != args.ignore_index; });
  }
  double loss = 0;
  for (int64_t k = 0; k < args.heads; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < blocks.per_head; ++b) sum += sums[k * blocks.per_head + b];
    const double mean = sum / static_cast<double>(*args.count);
    write(args.losses, k, mean, args.wide());
    if (args.weights[k] != 0) loss += args.weights[k] * mean;
  }
  write(args.loss, 0, loss, args.wide());
}

template <>
void cross_entropy_backward(const CrossEntropyBackward& args, const Cpu& cpu) {
  const auto& table = kernels<CrossEntropyKernels>();
  const double grad =
      args.wide() ? *static_cast<const double*>(args.grad) : *static_cast<const float*>(args.grad);
  for_each_block(
      args, Blocks(args), cpu.threads, [&](int64_t, int64_t head, int64_t first, int64_t end) {
        const int dtype = static_cast<int>(args.dtypes[head]);
        const int64_t row_bytes = args.classes * size_of(args.dtypes[head]);
        if (args.weights[head] == 0) {
          std::memset(static_cast<char*>(args.grads[head]) + first * row_bytes, 0,
                      static_cast<size_t>((end - first) * row_bytes));
          return;
        }
        const double scale = grad * args.weights[head] / static_cast<double>(*args.count);
        table.gradient[dtype](rows_of(args, head), first, end, scale, args.grads[head]);
      });
}

}  // namespace mmbal
