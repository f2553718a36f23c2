// What the host side of every kernel shares: errors, devices, launches, lists of tensors.
#pragma once

#include <cuda_runtime.h>

#include "operations.h"

namespace mmbal::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Tensors of one launch: as many as the 32,764 bytes of kernel parameters hold.
constexpr int kMaxTensors = 792;
constexpr size_t kMaxParameterBytes = 32764;

struct Tensors {
  void* data[kMaxTensors];
  int64_t count[kMaxTensors];
  int64_t offset[kMaxTensors];
  int32_t begin[kMaxTensors + 1];  // number of chunks before each tensor; last: of all
  int32_t size;
  int32_t row[kMaxTensors];
  int32_t modality[kMaxTensors];
  uint32_t id[kMaxTensors];
  uint8_t dtype[kMaxTensors];

  // Takes gradients[first] and those behind it that fit and returns how many. Their moments have
  // the rows that the caller gave, or 0, 1, 2, ... of the launch.
  int64_t fill(const Gradient* gradients, int64_t first, int64_t count, bool own_rows);
  int32_t chunks() const { return begin[size]; }
};

// What is in Queue::workspace. Counters come first and are zero between calls, whatever operation
// used the memory before.
struct Workspace {
  uint32_t* tensor_counters;  // [kMaxTensors] chunks done
  uint32_t* block_counter;    // blocks done
  double* rows;               // [kMaxTensors, 3] moments
  Partial* partials;          // of the chunks of a launch
  double* sums;               // of the scores, in place of rows and partials

  explicit Workspace(void* memory);
  static int64_t bytes_for_chunks(int64_t chunks);
  static int64_t bytes_for_sums(int64_t sums);
};

// Throws std::runtime_error("<call>: <name of the error> (<its text>)").
void check(cudaError_t error, const char* call);

// Makes a device current, and the one before again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Arguments>
void launch(void (*kernel)(const Arguments __grid_constant__), dim3 blocks, int threads,
            const Queue& queue, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kMaxParameterBytes, "more than a kernel can be passed");
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments), "cudaLaunchKernelEx");
}

// One launch: moments of `tensors` to their rows of `out`.
void launch_moments(const Tensors& tensors, double* out, const Workspace& workspace,
                    const Queue& queue);

}  // namespace mmbal::cuda
