#include "python/tensors.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace mmbal {
namespace {

using namespace pybind11::literals;

// Whether a tensor is a view of negated memory. The exchange API does not tell, and to ask torch
// for each tensor of a list drops the GIL as often, a fifth of the list's host side. So the bit is
// read where torch keeps it, a place that is found by comparing views that differ in nothing else;
// where none is found, torch is asked.
class NegativeBit {
 public:
  explicit NegativeBit(py::handle torch) {
    // So many, of different sizes and all alive, that no bit of an address takes part by chance.
    constexpr int kPairs = 48;
    std::vector<py::object> plain, negated;
    for (int i = 0; i < kPairs; ++i) {
      const char* dtype = i % 3 == 0 ? "float32" : i % 3 == 1 ? "float64" : "float16";
      plain.push_back(torch.attr("ones")(py::make_tuple(1 + 7 * i), "dtype"_a = torch.attr(dtype),
                                         "device"_a = "cpu"));
      negated.push_back(torch.attr("_neg_view")(plain.back()));
    }
    if (!find_pointer(plain[0])) return;
    constexpr size_t kWords = 24;  // of an implementation at most: it has more
    for (size_t i = 1; i < kWords && !found_; ++i) {
      const uint64_t bit = word(implementation(plain[0]), i) ^ word(implementation(negated[0]), i);
      if (bit == 0 || (bit & (bit - 1)) != 0) continue;
      bool everywhere = true;
      for (int j = 0; j < kPairs; ++j) {
        everywhere &= (word(implementation(plain[j]), i) & bit) == 0;
        everywhere &= (word(implementation(negated[j]), i) & bit) != 0;
      }
      if (everywhere) {
        key_ = i;
        bit_ = bit;
        found_ = true;
      }
    }
  }
  bool found() const { return found_; }
  bool of(py::handle tensor) const {
    if (found_) return (word(implementation(tensor), key_) & bit_) != 0;
    return tensor.attr("is_neg")().cast<bool>();
  }

 private:
  static uint64_t word(const void* memory, size_t i) {
    uint64_t value;
    std::memcpy(&value, static_cast<const char*>(memory) + 8 * i, sizeof value);
    return value;
  }
  const void* implementation(py::handle tensor) const {
    return reinterpret_cast<const void*>(word(tensor.ptr(), pointer_));
  }
  // Where a tensor has the address of its implementation.
  bool find_pointer(py::handle tensor) {
    const size_t words = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize) / 8;
    const auto address = tensor.attr("_cdata").cast<uint64_t>();
    size_t at = 2;  // behind reference count and type
    while (at < words && word(tensor.ptr(), at) != address) ++at;
    pointer_ = at;
    return at < words;
  }

  size_t pointer_ = 0, key_ = 0;  // words: the implementation in a tensor, the bit in that
  uint64_t bit_ = 0;
  bool found_ = false;
};

// Found once and kept for the life of the process.
struct Torch {
  const DLPackExchangeAPI* api;
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* no_dispatch;  // what a type without __torch_dispatch__ of its own has under that name
  NegativeBit negative_bit;

  explicit Torch(const py::module_& torch) : negative_bit(torch) {
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
    no_dispatch = py::object(type.attr("__torch_dispatch__")).release().ptr();
    tensor = reinterpret_cast<PyTypeObject*>(type.release().ptr());
    parameter = reinterpret_cast<PyTypeObject*>(
        torch.attr("nn").attr("Parameter").cast<py::object>().release().ptr());
  }
};

const Torch& torch() {
  static const Torch* found = new Torch(py::module_::import("torch"));
  return *found;
}

Layout layout_of(const DLTensor& tensor, int64_t count) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1) contiguous &= tensor.strides[d] == expected;
    expected *= tensor.shape[d];
  }
  if (contiguous || count <= 1) return Layout::kContiguous;
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

bool is_tensor(py::handle object) {
  return PyType_IsSubtype(Py_TYPE(object.ptr()), torch().tensor) != 0;
}

bool has_plain_memory(py::handle object) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == torch().tensor || type == torch().parameter) return true;
  return is_tensor(object) &&
         py::handle(reinterpret_cast<PyObject*>(type)).attr("__torch_dispatch__").ptr() ==
             torch().no_dispatch;
}

bool export_view(py::handle object, View* out) {
  if (torch().api->dltensor_from_py_object_no_sync(object.ptr(), &out->tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  out->count = 1;
  for (int32_t d = 0; d < out->tensor.ndim; ++d) out->count *= out->tensor.shape[d];
  if (out->tensor.data == nullptr && out->count != 0) return false;
  out->layout = layout_of(out->tensor, out->count);
  out->negated = torch().negative_bit.of(object);
  return true;
}

bool reads_negative_bit() { return torch().negative_bit.found(); }

namespace {

// What a tensor is that has no plain memory, in words of torch's users.
std::string kind_of(py::handle object) {
  const py::module_ module = py::module_::import("torch");
  const py::object type = py::reinterpret_borrow<py::object>(py::type::handle_of(object));
  const std::string name = py::str(type.attr("__qualname__"));
  if (!is_tensor(object)) return name;
  if (!has_plain_memory(object)) return std::string(py::str(type.attr("__module__"))) + "." + name;
  if (module.attr("_is_functional_tensor")(object).cast<bool>()) return "functionalized " + name;
  const py::object functorch = module.attr("_C").attr("_functorch");
  if (functorch.attr("is_functorch_wrapped_tensor")(object).cast<bool>()) {
    return name + " within a transform of torch.func";
  }
  if (object.attr("_is_zerotensor")().cast<bool>()) return name + " of zeros without memory";
  if (object.attr("is_neg")().cast<bool>()) return "negated view, resolve_neg() copies it";
  return name;
}

}  // namespace

void throw_not_viewable(py::handle object, const std::string& name) {
  std::string got = kind_of(object);
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
