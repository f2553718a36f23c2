// Stands for csrc/cuda in a build without it.
#include "device.h"

#if !defined(MMBAL_WITH_CUDA)

namespace mmbal {

int cuda_device_count() { return 0; }
std::string cuda_unavailable() { return "was built without CUDA kernels"; }

}  // namespace mmbal

#endif
