#include "operations/gradient_dots.h"

#include "cpu/chunks.h"
#include "cpu/dispatch.h"
#include "cpu/kernels/gradient_dots.h"
#include "device.h"

namespace mmbal {

template <>
void gradient_dots(const GradientDots& args, const Cpu& cpu) {
  static thread_local std::vector<Chunk> chunks;
  static thread_local std::vector<Dots> memory;
  const auto& table = kernels<DotKernels>();
  const int64_t elements = list_chunks(args.first, args.count, chunks);
  memory.resize(chunks.size());
  // The threads' names for this thread's memory.
  const std::vector<Chunk>& list = chunks;
  std::vector<Dots>& parts = memory;
  parallel_for(static_cast<int64_t>(list.size()), kGrain,
               useful_threads(2 * elements / kReadsPerWork, cpu.threads), [&](int64_t i) {
                 const Gradient& first = args.first[list[i].gradient];
                 const Span part = span(first, list[i]);
                 parts[i] = table.dots[static_cast<int>(first.dtype)](
                     part.data, beside(args.second, first, list[i]), part.count);
               });
  const Dots* next = parts.data();
  for (int64_t g = 0; g < args.count; ++g) {
    Dots sum{};
    for (int64_t c = 0; c * kChunk < args.first[g].count; ++c) add(*next++, &sum);
    double* row = args.out + 3 * args.first[g].row;
    row[0] = sum.first;
    row[1] = sum.both;
    row[2] = sum.second;
  }
}

}  // namespace mmbal
