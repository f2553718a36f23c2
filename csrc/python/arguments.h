// What the bindings of all operations share: arguments of Python as memory, and the device to run
// on. An argument that cannot be used is an error that names operation and argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/floating_mode.h"
#include "device.h"
#include "operations/gradients.h"
#include "python/tensors.h"

namespace mmbal {

// The items of a list or tuple as they are now: no code that runs meanwhile takes any of them away.
// `rule` is the error for other objects.
class Sequence {
 public:
  Sequence(py::handle object, const char* rule);
  int64_t size() const { return PyTuple_GET_SIZE(items_.ptr()); }
  py::handle operator[](int64_t i) const { return PyTuple_GET_ITEM(items_.ptr(), i); }

 private:
  py::object items_;
};

// Details of integer().
bool read_integer(py::handle object, int64_t* value);
[[noreturn]] void throw_not_integer(const std::string& what, py::handle object, int64_t least,
                                    int64_t most);

// An integer in [least, most]. `what` is called for errors only.
template <class What>
int64_t integer(What&& what, py::handle object, int64_t least, int64_t most) {
  int64_t value;
  if (!read_integer(object, &value) || value < least || value > most) {
    throw_not_integer(what(), object, least, most);
  }
  return value;
}
// What errors call one of several.
std::string position(const std::string& name, int64_t index);

using Shape = std::vector<int64_t>;
std::string to_string(const Shape& shape);
Shape shape_of(const View& tensor);

// A contiguous tensor of one type and shape.
View checked(const std::string& what, py::handle object, DLDataTypeCode code, int bits,
             const Shape& shape);
// The same of one dimension, of any length.
View checked_vector(const std::string& what, py::handle object, DLDataTypeCode code, int bits);
// The same of one element, whatever its dimensions.
View checked_one(const std::string& what, py::handle object, DLDataTypeCode code, int bits);

// A tensor of one of the four types that gradients and logits may have.
View checked_float(const std::string& what, py::handle object, DType* dtype);

// Logits or soft labels: a contiguous matrix of at least one column, of a device.
View checked_rows(const std::string& what, py::handle object, const View& beside, DType* dtype);

void require_shape(const View& tensor, const std::string& what, const Shape& shape);
void require_device(const View& tensor, const std::string& what, const View& other,
                    const std::string& others);
void require_cpu(const DLDevice& device);
// Whether the CUDA kernels of this module, real or emulated, are for tensors of that device.
bool runs_on_cuda(const DLDevice& device);

// The step that noise belongs to: an integer, or an int64 tensor of one element beside others.
// `counter` is that tensor, its data null where there is none.
NoiseSource noise_source(const std::string& op, uint64_t seed, py::handle step, View* counter);

// int32 of one element or None, which is null.
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
  std::vector<int64_t> gaps;  // positions of tensors that must be packed: not dense, or negated
  View first;                 // any of them, for the device
  bool mixed = false;         // more than one device

  Gradients(const std::string& op, const Sequence& list, py::handle names);
  int64_t count() const { return static_cast<int64_t>(items.size()); }
  // Where the caller must step in: positions of tensors with gaps, True for several devices, None.
  py::object unfit() const;
};

// Each gradient's modality, from one index in [0, count) for every item of the list.
void assign_modalities(const std::string& op, const Sequence& modality, int64_t listed,
                       int64_t count, py::handle names, std::vector<Gradient>& gradients);

// Orders places in memory by address, those of one address as they were.
struct Place {
  uintptr_t address;
  size_t index;  // in the list
};
void sort_places(std::vector<Place>& places);

// Lists that are walked together: gradients, and at their positions other tensors of their shape,
// type, device and order in memory. Where one is None or empty, all of the position are left out.
class Companions {
 public:
  // `lists` are what errors call them; `names` are the gradients' own.
  Companions(const std::string& op, std::vector<std::string> lists, std::vector<Sequence> sequences,
             py::handle names);
  int64_t listed() const { return sequences_[0].size(); }
  int64_t count() const { return static_cast<int64_t>(gradients.size()); }
  // As that of Gradients; to be packed are those that lie in different orders, too.
  py::object unfit() const;
  // That no gradient shares memory with another tensor of any list; for dense ones.
  void require_apart() const;

  std::vector<Gradient> gradients;
  std::vector<std::vector<void*>> others;  // of each list behind the first
  View first{};                            // any of them, for the device

 private:
  std::string name(size_t list, int64_t row) const;

  std::string op_;
  std::vector<std::string> lists_;
  std::vector<Sequence> sequences_;
  py::handle names_;
  std::vector<int64_t> unfit_;
  bool mixed_ = false;
};

// That no element of a tensor is beyond what int64 counts.
template <class What>
void require_offset(What&& what, int64_t offset, int64_t count) {
  if (offset <= INT64_MAX - count) return;
  throw py::value_error(what() + " must leave room for " + std::to_string(count) +
                        " elements below 2^63 (got " + std::to_string(offset) + ")");
}

// Calls run(device) without the GIL, for the device that a tensor is on. workspace(bytes, index of
// the device, stream, whether that is captured) is Python's and returns a tensor.
template <class Run>
void on_device_of(const View& tensor, int threads, py::handle workspace, Run&& run) {
  const DLDevice& device = tensor.tensor.device;
  if (runs_on_cuda(device)) {
    py::object memory;  // held until the work is queued
    void* stream = device.device_type == kDLCUDA ? current_stream(device) : nullptr;
    const Cuda cuda{device.device_id, stream, [&](int64_t bytes, bool captured) {
                      py::gil_scoped_acquire gil;
                      const auto number = reinterpret_cast<uintptr_t>(stream);
                      memory = workspace(bytes, device.device_id, number, captured);
                      return view(memory, [] { return std::string("workspace"); }).data();
                    }};
    py::gil_scoped_release release;
    run(cuda);
    return;
  }
  require_cpu(device);
  py::gil_scoped_release release;
  const FloatingMode mode;
  run(Cpu{threads});
}

}  // namespace mmbal
