#include "python/arguments.h"

namespace mmbal {

namespace {

void require_type(const View& tensor, const std::string& what, py::handle object,
                  DLDataTypeCode code, int bits) {
  const DLDataType& type = tensor.tensor.dtype;
  if (type.code == code && type.bits == bits && type.lanes == 1) return;
  const std::string name = code == kDLBool    ? "bool"
                           : code == kDLFloat ? "float" + std::to_string(bits)
                                              : "int" + std::to_string(bits);
  throw py::type_error(what + " must be " + name + " (got " + dtype_name(object) + ")");
}

void require_contiguous(const View& tensor, const std::string& what) {
  if (tensor.layout == Layout::kContiguous) return;
  throw py::value_error(
      what + " must be contiguous (got shape " + to_string(shape_of(tensor)) + ", strides " +
      to_string({tensor.tensor.strides, tensor.tensor.strides + tensor.tensor.ndim}) + ")");
}

std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

}  // namespace

Sequence::Sequence(py::handle object, const char* rule) {
  // Not what can be read once only, nor what has no order.
  if (PySequence_Check(object.ptr()) && !PyUnicode_Check(object.ptr())) {
    items_ = py::reinterpret_steal<py::object>(PySequence_Tuple(object.ptr()));
    if (!items_) throw py::error_already_set();
    return;
  }
  throw py::type_error(std::string(rule) + " (got " + type_name(object) + ")");
}

bool read_integer(py::handle object, int64_t* value) {
  const bool plain = PyLong_CheckExact(object.ptr());
  if (!plain && (!PyIndex_Check(object.ptr()) || is_tensor(object))) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  if (*value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return overflow == 0;
}

void throw_not_integer(const std::string& what, py::handle object, int64_t least, int64_t most) {
  if (!PyIndex_Check(object.ptr()) || is_tensor(object)) {
    throw py::type_error(what + " must be an integer (got " + type_name(object) + ")");
  }
  throw py::value_error(what + " must be from " + std::to_string(least) + " to " +
                        std::to_string(most) + " (got " + std::string(py::str(object)) + ")");
}

std::string position(const std::string& name, int64_t index) {
  return name + "[" + std::to_string(index) + "]";
}

std::string to_string(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

Shape shape_of(const View& tensor) {
  return {tensor.tensor.shape, tensor.tensor.shape + tensor.tensor.ndim};
}

View checked(const std::string& what, py::handle object, DLDataTypeCode code, int bits,
             const Shape& shape) {
  const View tensor = view(object, [&] { return what; });
  require_type(tensor, what, object, code, bits);
  require_shape(tensor, what, shape);
  require_contiguous(tensor, what);
  return tensor;
}

View checked_vector(const std::string& what, py::handle object, DLDataTypeCode code, int bits) {
  const View tensor = view(object, [&] { return what; });
  require_type(tensor, what, object, code, bits);
  require_shape(tensor, what, {tensor.count});
  require_contiguous(tensor, what);
  return tensor;
}

View checked_one(const std::string& what, py::handle object, DLDataTypeCode code, int bits) {
  const View tensor = view(object, [&] { return what; });
  require_type(tensor, what, object, code, bits);
  if (tensor.count == 1) return tensor;
  throw py::value_error(what + " must have one element (got shape " + to_string(shape_of(tensor)) +
                        ")");
}

View checked_float(const std::string& what, py::handle object, DType* dtype) {
  const View tensor = view(object, [&] { return what; });
  *dtype = float_type(tensor, object, [&] { return what; });
  return tensor;
}

View checked_rows(const std::string& what, py::handle object, const View& beside, DType* dtype) {
  const View tensor = checked_float(what, object, dtype);
  if (tensor.tensor.ndim != 2 || tensor.tensor.shape[1] == 0) {
    throw py::value_error(what + " must have shape [rows, classes], classes >= 1 (got " +
                          to_string(shape_of(tensor)) + ")");
  }
  require_contiguous(tensor, what);
  require_device(tensor, what, beside, "the others");
  return tensor;
}

void require_shape(const View& tensor, const std::string& what, const Shape& shape) {
  if (shape_of(tensor) == shape) return;
  throw py::value_error(what + " must have shape " + to_string(shape) + " (got " +
                        to_string(shape_of(tensor)) + ")");
}

void require_device(const View& tensor, const std::string& what, const View& other,
                    const std::string& others) {
  if (tensor.same_device(other)) return;
  throw py::value_error(what + " must be on the device of " + others + " (got " +
                        device_name(tensor.tensor.device) + " and " +
                        device_name(other.tensor.device) + ")");
}

NoiseSource noise_source(const std::string& op, uint64_t seed, py::handle step, View* counter) {
  const std::string what = op + ": step";
  counter->tensor.data = nullptr;
  if (!is_tensor(step)) {
    return {seed, integer([&] { return what; }, step, INT64_MIN, INT64_MAX), nullptr};
  }
  *counter = checked_one(what, step, kDLInt, 64);
  return {seed, 0, static_cast<const int64_t*>(counter->data())};
}

int32_t* optional_status(const std::string& op, py::handle status, const View& beside) {
  if (status.is_none()) return nullptr;
  const View tensor = checked_one(op + ": status", status, kDLInt, 32);
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
  if (names.is_none()) return op + ": gradient " + position("grads", index);
  return op + ": gradient '" + std::string(py::str(py::object(names[py::int_(index)]))) + "'";
}

Gradients::Gradients(const std::string& op, const Sequence& list, py::handle names) {
  items.reserve(static_cast<size_t>(list.size()));
  for (int64_t i = 0; i < list.size(); ++i) {
    const py::handle object = list[i];
    if (object.is_none()) continue;
    const auto name = [&] { return gradient_name(op, names, i); };
    const View tensor = view(object, name, true);
    Gradient gradient{};
    gradient.dtype = float_type(tensor, object, name);
    if (tensor.layout == Layout::kOverlapping) {
      throw std::runtime_error(name() + " must not share memory between its elements (got shape " +
                               std::string(py::str(py::list(object.attr("shape")))) + ", strides " +
                               std::string(py::str(object.attr("stride")())) + ")");
    }
    if (tensor.count == 0) continue;
    if (!tensor.dense() || tensor.negated) gaps.push_back(i);
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
