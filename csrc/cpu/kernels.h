// What one thread does to one chunk of memory, compiled once per instruction set (kernels.cpp) and
// chosen at run time (dispatch.cpp). Threads, tensors and validation are the callers' business.
#pragma once

#include <cstdint>

#include "math/moments.h"
#include "math/philox.h"

namespace mmbal {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
constexpr int kDTypes = 4;

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Rows of one head's logits, and what they should be.
struct Rows {
  const void* logits;  // [rows, classes]
  int64_t classes;
  const int64_t* labels;  // [rows], or null:
  const void* soft;       // [rows, classes], float64 if the logits are, else float32; or null
  int64_t ignore_index;
  double smoothing;
  void* top;      // [rows] maximum of each row, in the type of `soft`
  void* log_sum;  // [rows] log of the sum of exp(x - maximum)
};

struct KernelTable {
  const char* name;

  // Philox itself, for the published known answers; rounds is 7 or 10.
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]);

  // Mean and M2 of data[0 .. count), 0 < count <= kChunk.
  Partial (*moments[kDTypes])(const void* data, int64_t count);

  // data[i] <- k * data[i]; returns whether every element was finite.
  bool (*scale[kDTypes])(void* data, int64_t count, double k);

  // data[i] <- k * data[i] + amplitude * normal(key, index + i).
  void (*scale_and_add_noise[kDTypes])(void* data, int64_t count, double k, double amplitude,
                                       const NoiseKey& key, uint64_t index);

  // data[i] <- normal(key, index + i).
  void (*noise[kDTypes])(void* data, int64_t count, const NoiseKey& key, uint64_t index);

  // Softmax of a row of logits at `label`, or its mean under the soft labels in `weights`
  // (same type as the row).
  double (*row_score[kDTypes])(const void* row, int64_t classes, int64_t label);
  double (*soft_row_score[kDTypes])(const void* row, int64_t classes, const void* weights);

  // Sum of the cross-entropies of rows [first, end); writes their top and log_sum.
  double (*cross_entropy[kDTypes])(const Rows& rows, int64_t first, int64_t end);

  // From top and log_sum: scale times the gradients of these rows, to the same rows of `out`.
  void (*cross_entropy_gradient[kDTypes])(const Rows& rows, int64_t first, int64_t end,
                                          double scale, void* out);
};

// The best table that this processor runs, or the one that MMBAL_CPU_ISA names.
// Throws std::runtime_error when that one is unknown or not supported here.
const KernelTable& kernels();

}  // namespace mmbal
