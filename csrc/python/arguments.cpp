#include "python/arguments.h"

namespace mmbal {

View checked(const std::string& what, py::handle object, DLDataTypeCode code, int bits) {
  const View tensor = view(object, [&] { return what; });
  const DLDataType& type = tensor.tensor.dtype;
  if (type.code != code || type.bits != bits) {
    throw py::type_error(what + " must be " + (code == kDLFloat ? "float" : "int") +
                         std::to_string(bits) + " (got " + dtype_name(object) + ")");
  }
  if (tensor.layout != Layout::kDense) throw py::value_error(what + " must be contiguous");
  return tensor;
}

View checked_float(const std::string& what, py::handle object, DType* dtype) {
  const View tensor = view(object, [&] { return what; });
  *dtype = float_type(tensor, object, [&] { return what; });
  return tensor;
}

void require_device(const View& tensor, const std::string& what, const View& other,
                    const std::string& others) {
  if (tensor.same_device(other)) return;
  throw py::value_error(what + " must be on the device of " + others + " (got " +
                        device_name(tensor.tensor.device) + " and " +
                        device_name(other.tensor.device) + ")");
}

int32_t* optional_status(const std::string& op, py::handle status, const View& beside) {
  if (status.is_none()) return nullptr;
  const View tensor = checked(op + ": status", status, kDLInt, 32);
  require_device(tensor, op + ": status", beside, "the tensors");
  return static_cast<int32_t*>(tensor.data());
}

void require_labels(const std::string& op, const View& labels, int64_t count, int64_t classes,
                    int64_t ignore_index) {
  if (labels.tensor.device.device_type == kKernelDevice) return;
  const auto* label = static_cast<const int64_t*>(labels.data());
  for (int64_t b = 0; b < count; ++b) {
    if (label[b] == ignore_index || (label[b] >= 0 && label[b] < classes)) continue;
    throw py::index_error(op + ": target must be in [0, " + std::to_string(classes) +
                          ") or ignore_index (got " + std::to_string(label[b]) + " at " +
                          std::to_string(b) + ")");
  }
}

void require_cpu(const DLDevice& device) {
  if (device.device_type == kDLCPU) return;
  throw py::type_error(std::string("mmbal_fast: tensors must be on cpu") +
                       (kWithCuda ? " or cuda" : ", this build has no CUDA kernels") + " (got " +
                       device_name(device) + ")");
}

std::string gradient_name(const std::string& op, py::handle names, int64_t index) {
  if (names.is_none()) return op + ": gradient grads[" + std::to_string(index) + "]";
  return op + ": gradient '" + std::string(py::str(py::object(names[py::int_(index)]))) + "'";
}

Gradients::Gradients(const std::string& op, const Sequence& list, py::handle names) {
  items.reserve(static_cast<size_t>(list.size()));
  for (int64_t i = 0; i < list.size(); ++i) {
    const py::handle object = list[i];
    if (object.is_none()) continue;
    const auto name = [&] { return gradient_name(op, names, i); };
    const View tensor = view(object, name);
    Gradient gradient{};
    gradient.dtype = float_type(tensor, object, name);
    if (tensor.layout == Layout::kOverlapping) {
      throw std::runtime_error(name() + " must not share memory between its elements (got shape " +
                               std::string(py::str(py::list(object.attr("shape")))) + ", strides " +
                               std::string(py::str(object.attr("stride")())) + ")");
    }
    if (tensor.count == 0) continue;
    if (tensor.layout == Layout::kSparse) gaps.push_back(i);
    if (items.empty()) first = tensor;
    mixed |= !tensor.same_device(first);
    gradient.data = tensor.data();
    gradient.count = tensor.count;
    gradient.row = i;
    items.push_back(gradient);
  }
}

py::object Gradients::unfit() const {
  if (mixed) return py::bool_(true);
  if (!gaps.empty()) return py::cast(gaps);
  return py::none();
}

}  // namespace mmbal
