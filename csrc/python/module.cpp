// The native module: checks arguments, turns tensors into memory, runs the CPU or CUDA code.
// mmbal_fast.functional documents the operations; these are its private other half.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "device.h"
#include "python/tensors.h"

#if __has_include("build_config.h")
#include "build_config.h"
#endif

#ifndef MMBAL_MODULE_NAME
#define MMBAL_MODULE_NAME _C
#endif

// The families of operations: csrc/python/<family>.cpp has bind_<family>.
#define MMBAL_FAMILIES(f)                                                                   \
  f(gradients) f(scores) f(cross_entropy) f(speeds) f(objects) f(gradient_dots) f(dropping) \
      f(pull) f(pareto)

namespace mmbal {

#define MMBAL_DECLARE(family) void bind_##family(py::module_& m);
MMBAL_FAMILIES(MMBAL_DECLARE)
#undef MMBAL_DECLARE

namespace {

py::dict build_info() {
  py::dict info;
#if defined(MMBAL_BUILD_VERSION)
  info["version"] = MMBAL_BUILD_VERSION;
  info["compiler"] = MMBAL_BUILD_COMPILER;
  info["flags"] = MMBAL_BUILD_FLAGS;
#endif
  info["emulated"] = cuda_memory() == CudaMemory::kHost;
  info["cuda"] = cuda_memory() != CudaMemory::kNone;
#if defined(MMBAL_BUILD_CUDA_VERSION)
  info["cuda_version"] = MMBAL_BUILD_CUDA_VERSION;
  info["cuda_architectures"] = MMBAL_BUILD_CUDA_ARCHITECTURES;
#endif
  return info;
}

}  // namespace
}  // namespace mmbal

#if defined(MMBAL_CUDA_EMULATED)
namespace emulation {
void bind(pybind11::module_& m);  // what tests ask of the stand-in for CUDA
}
#endif

PYBIND11_MODULE(MMBAL_MODULE_NAME, m) {
  using namespace mmbal;
  m.doc() = "Native kernels of mmbal_fast; use mmbal_fast.functional.";
  chosen_isa();          // an unusable MMBAL_CPU_ISA fails here, once
  reads_negative_bit();  // looks at torch now, while nothing changes what its functions return
#define MMBAL_BIND(family) bind_##family(m);
  MMBAL_FAMILIES(MMBAL_BIND)
#undef MMBAL_BIND
  m.def("build_info", &build_info);
  m.def("reads_negative_bit", &reads_negative_bit);
  m.def("cpu_isa", [] { return name_of(chosen_isa()); });
  m.def("cpu_isas", &supported_isas);
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_unavailable", &cuda_unavailable);
#if defined(MMBAL_CUDA_EMULATED)
  emulation::bind(m);
#endif
}
