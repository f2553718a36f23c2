#include "operations/dropping.h"

#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels/dropping.h"
#include "cpu/parallel.h"
#include "device.h"
#include "math/convert.h"

namespace mmbal {
namespace {

void scale_rows(const FeatureRows& rows, const float* factors, int threads) {
  const auto& table = kernels<DroppingKernels>();
  int64_t work = 0;
  for (int64_t m = 0; m < rows.modalities; ++m) work += rows.batch * rows.widths[m] / kReadsPerWork;
  parallel_for(rows.modalities * rows.batch, 16, useful_threads(work, threads), [&](int64_t i) {
    const int64_t m = i / rows.batch;
    const int64_t bytes = rows.widths[m] * size_of(rows.dtypes[m]);
    if (bytes == 0) return;  // features of no width have no memory
    const int64_t at = i % rows.batch * bytes;
    char* to = static_cast<char*>(rows.to[m]) + at;
    if (factors[i] == 0) {  // whatever was there, NaN too
      std::memset(to, 0, static_cast<size_t>(bytes));
      return;
    }
    const char* from = static_cast<const char*>(rows.from[m]) + at;
    table.scaled[static_cast<int>(rows.dtypes[m])](from, to, rows.widths[m], factors[i]);
  });
}

void write(void* out, int64_t i, float value, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(out)[i] = value;
      return;
    case DType::kFloat64:
      static_cast<double*>(out)[i] = value;
      return;
    case DType::kFloat16:
      static_cast<Half*>(out)[i] = to_half(value);
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(out)[i] = to_bfloat16(value);
      return;
  }
}

}  // namespace

template <>
void drop_features(const DropFeatures& args, const Cpu& cpu) {
  const FeatureRows& rows = args.rows;
  double dropped = 0;
  double all = 0;
  for (int64_t m = 0; m < rows.modalities; ++m) {
    args.probabilities[m] = args.dropping.probability(m);
    dropped += static_cast<double>(rows.widths[m]) * args.probabilities[m];
    all += static_cast<double>(rows.widths[m]);
  }
  const auto factor = static_cast<float>(1 / (1 - (all > 0 ? dropped / all : 0)));
  for (int64_t b = 0; b < rows.batch; ++b) {
    bool any = false;
    for (int64_t m = 0; m < rows.modalities; ++m) {
      const bool kept = !args.dropping.drops(m, b, args.probabilities[m]);
      args.factors[m * rows.batch + b] = kept ? factor : 0.0f;
      any |= kept;
    }
    write(args.weight, b, any ? 1.0f : 0.0f, args.weight_dtype);
  }
  scale_rows(rows, args.factors, cpu.threads);
  if (args.advance) ++*args.advance;
}

template <>
void drop_features_backward(const DropFeaturesBackward& args, const Cpu& cpu) {
  scale_rows(args.rows, args.factors, cpu.threads);
}

}  // namespace mmbal
