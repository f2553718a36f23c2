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

#if defined(MMBAL_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// clang-format off
template <class Device> void measure(const struct Measurement&, const Device&);
template <class Device> void modulate(const struct Modulation&, const Device&);
template <class Device> void fill_with_noise(const struct Noise&, const Device&);
template <class Device> void philox(const struct PhiloxBlock&, const Device&);
template <class Device> void score(const struct Scores&, const Device&);
template <class Device> void derive(const struct Derivation&, const Device&);
template <class Device> void remember(const struct Memory&, const Device&);
template <class Device> void cross_entropy(const struct CrossEntropy&, const Device&);
template <class Device> void cross_entropy_backward(const struct CrossEntropyBackward&, const Device&);
template <class Device> void accumulate_speeds(const struct Speeds&, const Device&);
template <class Device> void drop_features(const struct DropFeatures&, const Device&);
template <class Device> void drop_features_backward(const struct DropFeaturesBackward&, const Device&);
template <class Device> void gradient_dots(const struct GradientDots&, const Device&);
template <class Device> void pull(const struct Pull&, const Device&);
template <class Device> void pareto(const struct Pareto&, const Device&);
// clang-format on

int cuda_device_count();         // 0 where there is no driver or this build has no kernels
std::string cuda_unavailable();  // why cuda_device_count() is 0, else empty

}  // namespace mmbal
