#include "operations/pull.h"

#include "cpu/chunks.h"
#include "cpu/dispatch.h"
#include "cpu/kernels/pull.h"
#include "device.h"

namespace mmbal {

template <>
void pull(const Pull& args, const Cpu& cpu) {
  static thread_local std::vector<Chunk> chunks;
  static thread_local std::vector<double> memory;
  const auto& table = kernels<PullKernels>();
  const int64_t elements = list_chunks(args.gradients, args.count, chunks);
  memory.resize(chunks.size());
  // The threads' names for this thread's memory.
  const std::vector<Chunk>& list = chunks;
  std::vector<double>& parts = memory;
  parallel_for(static_cast<int64_t>(list.size()), kGrain,
               useful_threads(4 * elements / kReadsPerWork, cpu.threads), [&](int64_t i) {
                 const Gradient& gradient = args.gradients[list[i].gradient];
                 const Span part = span(gradient, list[i]);
                 parts[i] = table.pull[static_cast<int>(gradient.dtype)](
                     part.data, beside(args.weights, gradient, list[i]),
                     beside(args.anchors, gradient, list[i]), part.count,
                     args.coefficients[gradient.modality]);
               });
  const double* next = parts.data();
  for (int64_t g = 0; g < args.count; ++g) {
    double sum = 0;
    for (int64_t c = 0; c * kChunk < args.gradients[g].count; ++c) sum += *next++;
    args.squares[args.gradients[g].row] = sum;
  }
}

}  // namespace mmbal
