#include <algorithm>
#include <stdexcept>

#include "cuda/launch.h"

namespace mmbal::cuda {
namespace {

constexpr int64_t kCounterBytes = (kMany + 2 + 63) / 64 * 64 * sizeof(uint32_t);
constexpr int64_t kRowBytes = kMany * 3 * sizeof(double);

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

Workspace workspace_of(const Cuda& cuda, int64_t bytes_behind_counters) {
  const auto stream = static_cast<cudaStream_t>(cuda.stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  const bool captured = status != cudaStreamCaptureStatusNone;
  char* bytes = static_cast<char*>(cuda.workspace(kCounterBytes + bytes_behind_counters, captured));
  // By the graph, whenever it runs: another graph, or none, may have used the memory before.
  if (captured) check(cudaMemsetAsync(bytes, 0, kCounterBytes, stream), "cudaMemsetAsync");
  auto* counters = reinterpret_cast<uint32_t*>(bytes);
  auto* rows = reinterpret_cast<double*>(bytes + kCounterBytes);
  auto* partials = reinterpret_cast<Partial*>(bytes + kCounterBytes + kRowBytes);
  return {counters, counters + kMany, counters + kMany + 1, rows, partials, rows};
}

}  // namespace

int32_t chunks_of(int64_t count) {
  const int64_t chunks = (count - 1) / kChunk + 1;
  if (chunks <= INT32_MAX) return static_cast<int32_t>(chunks);
  throw std::runtime_error("mmbal_fast: a tensor on CUDA must have at most " +
                           std::to_string(INT32_MAX * kChunk) + " elements (got " +
                           std::to_string(count) + ")");
}

int64_t chunks_of(const Gradient* gradients, int64_t count) {
  int64_t chunks = 0;
  for (int64_t g = 0; g < count; ++g) chunks += chunks_of(gradients[g].count);
  return chunks;
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here: not to be found again by whoever asks next
  throw std::runtime_error(std::string(call) + ": " + describe(error));
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);  // was current, so can be; and a destructor cannot throw
}

Workspace Workspace::for_chunks(const Cuda& cuda, int64_t chunks) {
  return workspace_of(cuda, kRowBytes + chunks * static_cast<int64_t>(sizeof(Partial)));
}

Workspace Workspace::for_sums(const Cuda& cuda, int64_t sums) {
  return workspace_of(cuda, sums * static_cast<int64_t>(sizeof(double)));
}

}  // namespace mmbal::cuda

namespace mmbal {

#if defined(MMBAL_CUDA_EMULATED)
CudaMemory cuda_memory() { return CudaMemory::kHost; }
#else
CudaMemory cuda_memory() { return CudaMemory::kDevice; }
#endif

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string cuda_unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : "found no CUDA device";
  cudaGetLastError();
  return "found no CUDA device: " + cuda::describe(error);
}

}  // namespace mmbal
