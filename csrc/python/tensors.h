// torch tensors as raw memory, and what is wrong with those that cannot be.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "math/dtype.h"
#include "python/dlpack.h"

namespace mmbal {

namespace py = pybind11;

enum class Layout {
  kContiguous,   // every element of a block of memory once, the last dimension fastest
  kDense,        // the same in another order of dimensions
  kSparse,       // gaps between elements
  kOverlapping,  // elements share memory
};

struct View {
  DLTensor tensor;
  int64_t count;
  Layout layout;
  bool negated;  // the elements are what is in memory times -1

  bool dense() const { return layout <= Layout::kDense; }
  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  bool on_cpu() const { return tensor.device.device_type == kDLCPU; }
  bool same_device(const View& other) const {
    return tensor.device.device_type == other.tensor.device.device_type &&
           tensor.device.device_id == other.tensor.device.device_id;
  }
};

// Views a torch tensor, or one of a subclass that only carries more with it, such as an image with
// metadata. Throws TypeError for what has no memory of its own to write to: no tensor, a subclass
// such as DTensor, a sparse or meta tensor, one within a transform; and for a negated view unless
// the caller takes those. `name` is called for errors only.
template <class Name>
View view(py::handle object, Name&& name, bool negated_too = false);

// Whether that negation is known without asking torch; see NegativeBit.
bool reads_negative_bit();

bool is_tensor(py::handle object);

// The stream that torch's work on a device runs on now.
void* current_stream(const DLDevice& device);

std::string device_name(const DLDevice& device);
std::string dtype_name(py::handle tensor);

// Which of the four types that gradients and logits may have. Throws TypeError for others.
template <class Name>
DType float_type(const View& tensor, py::handle object, Name&& name);

// Details of view().
bool has_plain_memory(py::handle object);
bool export_view(py::handle object, View* out);
[[noreturn]] void throw_not_viewable(py::handle object, const std::string& name);

// Details of float_type().
bool has_float_type(const DLDataType& type, DType* out);
[[noreturn]] void throw_not_float(py::handle object, const std::string& name);

template <class Name>
View view(py::handle object, Name&& name, bool negated_too) {
  View result;
  if (!has_plain_memory(object) || !export_view(object, &result) ||
      (result.negated && !negated_too)) {
    throw_not_viewable(object, name());
  }
  return result;
}

template <class Name>
DType float_type(const View& tensor, py::handle object, Name&& name) {
  DType result;
  if (!has_float_type(tensor.tensor.dtype, &result)) throw_not_float(object, name());
  return result;
}

}  // namespace mmbal
