// What the bindings of all operations share: arguments of Python as memory, and the device to run
// on. An argument that cannot be used is an error that names operation and argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "device.h"
#include "operations/gradients.h"
#include "python/tensors.h"

namespace mmbal {

// A list or tuple, or what becomes one; `what` is the error if it cannot.
class Sequence {
 public:
  Sequence(py::handle object, const char* what)
      : items_(py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), what))) {
    if (!items_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(items_.ptr()); }
  py::handle operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(items_.ptr(), i); }
  int64_t integer(int64_t i) const {
    const int64_t value = PyLong_AsLongLong((*this)[i].ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  py::object items_;
};

// A contiguous tensor of one type.
View checked(const std::string& what, py::handle object, DLDataTypeCode code, int bits);

// A tensor of one of the four types that gradients and logits may have.
View checked_float(const std::string& what, py::handle object, DType* dtype);

void require_device(const View& tensor, const std::string& what, const View& other,
                    const std::string& others);
void require_cpu(const DLDevice& device);

// int32 or None, which is null.
int32_t* optional_status(const std::string& op, py::handle status, const View& beside);

// On the CPU: every label is in [0, classes) or ignored. Kernels of a device do not wait for the
// host to look.
void require_labels(const std::string& op, const View& labels, int64_t count, int64_t classes,
                    int64_t ignore_index);

// What errors call a gradient: the caller's own name for it or its position.
std::string gradient_name(const std::string& op, py::handle names, int64_t index);

// A list of gradients as memory. Empty ones and None are dropped.
struct Gradients {
  std::vector<Gradient> items;
  std::vector<int64_t> gaps;  // positions of tensors that are not dense
  View first;                 // any of them, for the device
  bool mixed = false;         // more than one device

  Gradients(const std::string& op, const Sequence& list, py::handle names);
  int64_t count() const { return static_cast<int64_t>(items.size()); }
  // Where the caller must step in: positions of tensors with gaps, True for several devices, None.
  py::object unfit() const;
};

// Calls run(device) without the GIL, for the device that a tensor is on. workspace(bytes, index)
// is Python's and returns a tensor.
template <class Run>
void on_device_of(const View& tensor, int threads, py::handle workspace, Run&& run) {
  const DLDevice& device = tensor.tensor.device;
  if constexpr (kWithCuda) {
    if (device.device_type == kKernelDevice) {
      py::object memory;  // held until the work is queued
      Cuda cuda{device.device_id, nullptr, [&](int64_t bytes) {
                  py::gil_scoped_acquire gil;
                  memory = workspace(bytes, device.device_id);
                  return view(memory, [] { return std::string("workspace"); }).data();
                }};
      if (device.device_type == kDLCUDA) cuda.stream = current_stream(device);
      py::gil_scoped_release release;
      run(cuda);
      return;
    }
  }
  require_cpu(device);
  py::gil_scoped_release release;
  run(Cpu{threads});
}

}  // namespace mmbal
