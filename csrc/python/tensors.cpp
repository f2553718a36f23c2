#include "python/tensors.h"

#include <algorithm>

namespace mmbal {
namespace {

// Found once and kept for the life of the process.
struct Torch {
  const DLPackExchangeAPI* api;
  PyTypeObject* tensor;
  PyTypeObject* parameter;

  Torch() {
    py::module_ torch = py::module_::import("torch");
    py::object type = torch.attr("Tensor");
    py::capsule capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* found = capsule.get_pointer<const DLPackExchangeAPI>();
    while (found != nullptr && found->header.version.major > 1) {
      found = reinterpret_cast<const DLPackExchangeAPI*>(found->header.prev_api);
    }
    if (found == nullptr || found->dltensor_from_py_object_no_sync == nullptr) {
      throw py::import_error("mmbal_fast: torch's DLPack exchange API must be of version 1");
    }
    api = found;
    tensor = reinterpret_cast<PyTypeObject*>(type.release().ptr());
    parameter = reinterpret_cast<PyTypeObject*>(
        torch.attr("nn").attr("Parameter").cast<py::object>().release().ptr());
  }
};

const Torch& torch() {
  static const Torch* found = new Torch();
  return *found;
}

Layout layout_of(const DLTensor& tensor, int64_t count) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1) contiguous &= tensor.strides[d] == expected;
    expected *= tensor.shape[d];
  }
  if (contiguous || count <= 1) return Layout::kDense;
  constexpr int32_t kMaxDims = 64;  // torch's own limit
  std::pair<int64_t, int64_t> dims[kMaxDims];
  int n = 0;
  for (int32_t d = 0; d < std::min(tensor.ndim, kMaxDims); ++d) {
    if (tensor.shape[d] != 1) dims[n++] = {tensor.strides[d], tensor.shape[d]};
  }
  std::sort(dims, dims + n);
  // Each stride must step over everything that the smaller ones reach.
  bool dense = true;
  int64_t reach = 1;  // elements from the first to the last, both included
  for (int d = 0; d < n; ++d) {
    if (dims[d].first < reach) return Layout::kOverlapping;
    dense &= dims[d].first == reach;
    reach += dims[d].first * (dims[d].second - 1);
  }
  return dense ? Layout::kDense : Layout::kSparse;
}

}  // namespace

bool is_plain_tensor(py::handle object) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  return type == torch().tensor || type == torch().parameter;
}

bool export_view(py::handle object, View* out) {
  if (torch().api->dltensor_from_py_object_no_sync(object.ptr(), &out->tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  out->count = 1;
  for (int32_t d = 0; d < out->tensor.ndim; ++d) out->count *= out->tensor.shape[d];
  out->layout = layout_of(out->tensor, out->count);
  return true;
}

void throw_not_viewable(py::handle object, const std::string& name) {
  std::string got = py::str(py::type::handle_of(object).attr("__name__"));
  if (py::hasattr(object, "layout") && py::hasattr(object, "device")) {
    got += ", " + std::string(py::str(object.attr("layout"))) + ", " + dtype_name(object) + " on " +
           std::string(py::str(object.attr("device")));
  }
  throw py::type_error(name + " must be a plain dense tensor on cpu or cuda (got " + got + ")");
}

void* current_stream(const DLDevice& device) {
  void* stream = nullptr;
  if (torch().api->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

std::string device_name(const DLDevice& device) {
  return device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
}

std::string dtype_name(py::handle tensor) { return py::str(tensor.attr("dtype")); }

bool has_float_type(const DLDataType& type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) return *out = DType::kBFloat16, true;
  if (type.code != kDLFloat) return false;
  if (type.bits == 32) return *out = DType::kFloat32, true;
  if (type.bits == 64) return *out = DType::kFloat64, true;
  if (type.bits == 16) return *out = DType::kFloat16, true;
  return false;
}

void throw_not_float(py::handle object, const std::string& name) {
  throw py::type_error(name + " must be float32, float64, float16 or bfloat16 (got " +
                       dtype_name(object) + ")");
}

}  // namespace mmbal
