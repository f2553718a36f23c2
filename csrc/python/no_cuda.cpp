// Stands for csrc/cuda in a build without it, so that no caller needs to ask which build it is in.
#if !defined(MMBAL_WITH_CUDA)

#include <stdexcept>

#include "operations.h"

namespace mmbal::cuda {
namespace {

[[noreturn]] void fail() { throw std::runtime_error("mmbal_fast: " + unavailable()); }

}  // namespace

int64_t workspace_bytes(const Gradient*, int64_t) { return 0; }
int64_t scores_workspace_bytes(int64_t, int64_t) { return 0; }
int64_t cross_entropy_workspace_bytes(int64_t, int64_t) { return 0; }
void moments(const Gradient*, int64_t, double*, const Queue&) { fail(); }
void modulate(const Gradient*, int64_t, const Modulation&, const Queue&) { fail(); }
void noise(const Gradient&, const NoiseSource&, const Queue&) { fail(); }
void scores(const Scores&, const Queue&) { fail(); }
void derive(const Derivation&, const Queue&) { fail(); }
void accumulate_speeds(const Speeds&, const Queue&) { fail(); }
void cross_entropy(const CrossEntropy&, const Queue&) { fail(); }
void cross_entropy_backward(const CrossEntropy&, const Queue&) { fail(); }
void philox(const uint32_t*, const uint32_t*, int, uint32_t*) { fail(); }
int device_count() { return 0; }
std::string unavailable() { return "was built without CUDA kernels"; }

}  // namespace mmbal::cuda

#endif
