// Arguments of the operations on lists of gradients, on raw memory of one device. They are valid:
// csrc/python checks them.
#pragma once

#include "math/dtype.h"
#include "math/modulation.h"

namespace mmbal {

// The elements of one dense gradient, or of one shard of it.
struct Gradient {
  void* data;
  int64_t count;  // > 0
  DType dtype;
  int32_t modality;  // row of the coefficients
  uint32_t id;       // tensor id of the noise
  int64_t offset;    // global index of element 0
  int64_t row;       // row of the moments
};

struct NoiseSource {
  uint64_t seed;
  int64_t step;  // used where step_pointer is null
  const int64_t* step_pointer;
};

// Writes (count, mean, M2) of each gradient to row `row` of out [T, 3].
struct Measurement {
  const Gradient* gradients;
  int64_t count;
  double* out;
};

struct Modulation {
  const Gradient* gradients;
  int64_t count;              // may be 0
  const float* coefficients;  // [M]
  double noise;
  double eps;
  NoiseSource source;
  const double* moments;  // [T, 3] of the whole tensors, or null: measured here
  int32_t* status;        // kNonFiniteGradient is or-ed in; may be null
  int64_t* advance;       // step counter incremented at the end; may be null
  // Multiply gradients by *inverse_scale first, rounded to their type, and set *found_inf to 1
  // where one is not finite before that. Both null: do not.
  const float* inverse_scale;
  float* found_inf;
  bool single_launch;  // on CUDA: measure and update in one launch

  bool measures() const { return noise != 0 && moments == nullptr; }
};

// Writes the normals of a gradient's elements over them.
struct Noise {
  Gradient target;
  NoiseSource source;
};

// One block of Philox itself, for the published known answers.
struct PhiloxBlock {
  uint32_t counter[4];
  uint32_t key[2];
  int rounds;       // 7 or 10
  uint32_t* words;  // [4], of the host
};

}  // namespace mmbal
