// Stands for csrc/cuda in a build without it.
#include <stdexcept>

#include "device.h"

namespace mmbal {

CudaMemory cuda_memory() { return CudaMemory::kNone; }
int cuda_device_count() { return 0; }
std::string cuda_unavailable() { return "was built without CUDA kernels"; }

// Never called, since no tensor's memory is theirs.
#define MMBAL_NO_KERNEL(operation, Arguments)            \
  template <>                                            \
  void operation(const struct Arguments&, const Cuda&) { \
    throw std::logic_error(cuda_unavailable());          \
  }
MMBAL_OPERATIONS(MMBAL_NO_KERNEL)
#undef MMBAL_NO_KERNEL

}  // namespace mmbal
