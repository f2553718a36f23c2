#include "operations/pareto.h"

#include "cpu/chunks.h"
#include "cpu/dispatch.h"
#include "cpu/kernels/pareto.h"
#include "device.h"
#include "operations/gradient_dots.h"

namespace mmbal {

template <>
void pareto(const Pareto& args, const Cpu& cpu) {
  const int64_t count = args.count;
  std::vector<double> measured;
  const double* dots = args.dots;
  if (dots == nullptr && count > 0) {
    measured.resize(static_cast<size_t>(3 * (args.gradients[count - 1].row + 1)));
    gradient_dots(GradientDots{args.gradients, args.own, count, measured.data()}, cpu);
    dots = measured.data();
  }
  const auto row_of = [&](int64_t g) {
    const double* row = dots + 3 * args.gradients[g].row;
    return Dots{row[0], row[1], row[2]};
  };
  const double inverse = args.scale ? 1.0 / *args.scale : 1.0;
  std::vector<Dots> sums(static_cast<size_t>(args.modalities));
  for (int64_t g = 0; g < count; ++g) {
    add(dots_of_losses(row_of(g), inverse), &sums[args.gradients[g].modality]);
  }
  double* weights = args.out + args.modalities;
  for (int64_t m = 0; m < args.modalities; ++m) {
    args.out[m] = cosine(sums[m]);
    weights[m] = weight_of_fused(sums[m], args.out[m]);
  }
  std::vector<Combination> by(static_cast<size_t>(count));
  for (int64_t g = 0; g < count; ++g) {
    by[g] = combination(row_of(g), weights[args.gradients[g].modality], args.gamma, inverse);
  }
  static thread_local std::vector<Chunk> chunks;
  const int64_t elements = list_chunks(args.gradients, count, chunks);
  const std::vector<Chunk>& list = chunks;
  const auto& table = kernels<ParetoKernels>();
  parallel_for(static_cast<int64_t>(list.size()), kGrain,
               useful_threads(3 * elements / kReadsPerWork, cpu.threads), [&](int64_t i) {
                 const Gradient& gradient = args.gradients[list[i].gradient];
                 const Combination& how = by[list[i].gradient];
                 const Span part = span(gradient, list[i]);
                 if (how.share == 0 && how.scale == 1) return;
                 // Without a share the other gradient need not be read.
                 const char* own = how.share == 0 ? part.data : beside(args.own, gradient, list[i]);
                 table.combine[static_cast<int>(gradient.dtype)](part.data, own, part.count, how);
               });
}

}  // namespace mmbal
