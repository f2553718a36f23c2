// The operations that csrc/cpu and csrc/cuda implement alike, on raw memory of one device.
// Arguments are validated by the caller; pointers are memory of the device that runs.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/kernels.h"
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

struct Modulation {
  const float* coefficients;  // [M] float32
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

// Softmax scores of M modalities over a batch, and what follows from them.
struct Scores {
  const void* const* logits;  // M pointers to [B, C], rows contiguous
  const DType* dtypes;        // M
  int64_t modalities, batch, classes;
  const int64_t* labels;    // [B], or null:
  const void* const* soft;  // M pointers to [B, C] soft labels, in the type of logits[m]
  int64_t ignore_index;
  bool accumulate;  // add to the scores already in state
  float* state;     // [3, M] float32: scores, ratios, coefficients
  float alpha;
  Rule rule;        // kNone leaves the coefficients alone
  int32_t* status;  // kLabelOutOfRange is or-ed in; may be null
};

// What of `state` to derive from the row before it.
struct Derivation {
  float* state;  // [3, M]
  int64_t modalities;
  bool ratios;
  float alpha;
  Rule rule;
};

// Conditional learning speed: totals[g] += |gradients of g|^2 / |weights of g|^2, for all groups
// or, where one of these is not finite, for none.
struct Speeds {
  const double* moments;     // [2, T, 3]: of T weights, then of their gradients
  const double* membership;  // [G, T]: how often a tensor counts in a group
  double* totals;            // [G]
  int64_t groups, tensors;
  const bool* active;  // where false nothing is added; may be null
  bool* finite;        // written: whether all ratios are
};

// Cross-entropies of K heads for one target, and their weighted sum.
struct CrossEntropy {
  const void* const* logits;  // K pointers to [rows, classes]
  const DType* dtypes;        // K, all of them float64 or none
  int64_t heads, rows, classes;
  const int64_t* labels;  // [rows], or null:
  const void* soft;       // [rows, classes], as all below float64 if the logits are, else float32
  int64_t ignore_index;
  double smoothing;
  const double* weights;  // [K]
  // Written by the forward, read by the backward.
  void* normalizers;  // [2, K, rows]: maximum of each row, log of its sum of exp(x - maximum)
  int64_t* count;     // rows that are not ignored
  // Written by the forward.
  void* loss;
  void* losses;  // [K]
  // For the backward: the loss's gradient and where those of the logits go.
  const void* grad;
  void* const* grads;  // K pointers to [rows, classes]

  bool wide() const { return dtypes[0] == DType::kFloat64; }
};

namespace cpu {

// Writes (count, mean, M2) to rows `row` of out [T, 3].
void moments(const Gradient* gradients, int64_t count, double* out, int threads);
void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation, int threads);
void noise(const Gradient& tensor, const NoiseSource& source, int threads);
void scores(const Scores& scores, int threads);
void derive(const Derivation& derivation);
void accumulate_speeds(const Speeds& speeds);
void cross_entropy(const CrossEntropy& args, int threads);
void cross_entropy_backward(const CrossEntropy& args, int threads);

void philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]);

}  // namespace cpu

namespace cuda {

// Where to run. `workspace` has at least workspace_bytes(...) bytes, was zero when it was allocated
// and is left so that the next call on the same stream may use it as it is.
struct Queue {
  int device;
  void* stream;
  void* workspace;
};

int64_t workspace_bytes(const Gradient* gradients, int64_t count);
int64_t scores_workspace_bytes(int64_t modalities, int64_t batch);
int64_t cross_entropy_workspace_bytes(int64_t heads, int64_t rows);

// As in cpu; each returns once the work is queued. Throws std::runtime_error naming the CUDA call
// that failed.
void moments(const Gradient* gradients, int64_t count, double* out, const Queue& queue);
void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation,
              const Queue& queue);
void noise(const Gradient& tensor, const NoiseSource& source, const Queue& queue);
void scores(const Scores& scores, const Queue& queue);
void derive(const Derivation& derivation, const Queue& queue);
void accumulate_speeds(const Speeds& speeds, const Queue& queue);
void cross_entropy(const CrossEntropy& args, const Queue& queue);
void cross_entropy_backward(const CrossEntropy& args, const Queue& queue);
void philox(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t words[4]);

int device_count();         // 0 where there is no driver
std::string unavailable();  // why device_count() is 0, else empty

}  // namespace cuda
}  // namespace mmbal
