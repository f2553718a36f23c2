// The devices, and the one list of what a device does. csrc/cpu and csrc/cuda specialise each of
// these; the arguments of an operation are a struct in csrc/operations, valid when they come here,
// and their pointers are memory of the device that runs.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace mmbal {

struct Cpu {
  int threads;
};

// Operations return once their work is queued, and throw std::runtime_error with the name of the
// CUDA call that failed.
struct Cuda {
  int index;
  void* stream;
  // Memory of the device that stays until the work is queued; an operation asks once. Where the
  // stream is captured into a graph it is the operation's own and holds anything. Elsewhere it was
  // zero when it was allocated, and each operation leaves it as the next one of the same thread on
  // the same stream needs it.
  std::function<void*(int64_t bytes, bool captured)> workspace;
};

// Whose memory Cuda's kernels take: that of the emulated ones is the host's. Known when a module is
// linked, so that bindings are compiled once for all.
enum class CudaMemory { kNone, kHost, kDevice };  // kNone: a build without these kernels
CudaMemory cuda_memory();

#define MMBAL_OPERATIONS(DO)                       \
  DO(measure, Measurement)                         \
  DO(modulate, Modulation)                         \
  DO(fill_with_noise, Noise)                       \
  DO(philox, PhiloxBlock)                          \
  DO(score, Scores)                                \
  DO(derive, Derivation)                           \
  DO(remember, Memory)                             \
  DO(cross_entropy, CrossEntropy)                  \
  DO(cross_entropy_backward, CrossEntropyBackward) \
  DO(accumulate_speeds, Speeds)                    \
  DO(drop_features, DropFeatures)                  \
  DO(drop_features_backward, DropFeaturesBackward) \
  DO(gradient_dots, GradientDots)                  \
  DO(pull, Pull)                                   \
  DO(pareto, Pareto)
#define MMBAL_DECLARE(operation, Arguments) \
  template <class Device>                   \
  void operation(const struct Arguments&, const Device&);
MMBAL_OPERATIONS(MMBAL_DECLARE)
#undef MMBAL_DECLARE

int cuda_device_count();         // 0 where there is no driver or this build has no kernels
std::string cuda_unavailable();  // why cuda_device_count() is 0, else empty

}  // namespace mmbal
