// What the host side of every kernel shares: errors, devices, launches, lists of tensors.
#pragma once

#include <cuda_runtime.h>

#include "device.h"
#include "math/moments.h"
#include "operations/gradients.h"

namespace mmbal::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Tensors of one launch: as many as the 32,764 bytes of kernel parameters hold, or, where that is
// enough, as many as 4 KB hold. Parameters are copied to the device at every launch.
constexpr int kMany = 792;
constexpr int kFew = 94;
constexpr size_t kMaxParameterBytes = 32764;

// Number of chunks. Throws if a tensor has more of them than a grid has blocks.
int32_t chunks_of(int64_t count);
int64_t chunks_of(const Gradient* gradients, int64_t count);  // all together

template <int kCapacity>
struct Tensors {
  void* data[kCapacity];
  int64_t count[kCapacity];
  int64_t offset[kCapacity];
  int32_t begin[kCapacity + 1];  // number of chunks before each tensor; last: of all
  int32_t size;
  int32_t row[kCapacity];
  int32_t modality[kCapacity];
  uint32_t id[kCapacity];
  uint8_t dtype[kCapacity];

  // Takes the first gradients of [gradient, end) that fit and returns the one behind them. Their
  // moments have the rows that the caller gave, or 0, 1, 2, ... of the launch.
  const Gradient* fill(const Gradient* gradient, const Gradient* end, bool own_rows) {
    int64_t chunks = 0;
    for (size = 0; gradient != end && size < kCapacity; ++gradient, ++size) {
      const int32_t more = chunks_of(gradient->count);
      if (chunks + more > INT32_MAX) break;
      data[size] = gradient->data;
      count[size] = gradient->count;
      offset[size] = gradient->offset;
      begin[size] = static_cast<int32_t>(chunks);
      row[size] = own_rows ? size : static_cast<int32_t>(gradient->row);
      modality[size] = gradient->modality;
      id[size] = gradient->id;
      dtype[size] = static_cast<uint8_t>(gradient->dtype);
      chunks += more;
    }
    begin[size] = static_cast<int32_t>(chunks);
    return gradient;
  }
  MMBAL_HD int32_t chunks() const { return begin[size]; }
  MMBAL_HD int32_t chunks(int tensor) const { return begin[tensor + 1] - begin[tensor]; }
};

// What is in the workspace of a call. Counters come first and are zero between calls, whatever
// operation used the memory before.
struct Workspace {
  uint32_t* tensor_counters;  // [kMany] chunks done
  uint32_t* block_counter;    // blocks done
  uint32_t* ticket;           // blocks begun
  double* rows;               // [kMany, 3] moments
  Partial* partials;          // of the chunks of a launch
  double* sums;               // of the scores, in place of rows and partials

  static Workspace for_chunks(const Cuda& cuda, int64_t chunks);
  static Workspace for_sums(const Cuda& cuda, int64_t sums);
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
            const Cuda& cuda, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kMaxParameterBytes, "more than a kernel can be passed");
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(cuda.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments), "cudaLaunchKernelEx");
}

// One launch: moments of `tensors`, multiplied by *inverse_scale if that is not null, to their rows
// of `out`.
template <int kCapacity>
void launch_moments(const Tensors<kCapacity>& tensors, const float* inverse_scale, double* out,
                    const Workspace& workspace, const Cuda& cuda);

}  // namespace mmbal::cuda
