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
  if (runs_on_cuda(labels.tensor.device)) return;
  const auto* label = static_cast<const int64_t*>(labels.data());
  for (int64_t b = 0; b < count; ++b) {
    if (label[b] == ignore_index || (label[b] >= 0 && label[b] < classes)) continue;
    throw py::index_error(op + ": target must be in [0, " + std::to_string(classes) +
                          ") or ignore_index (got " + std::to_string(label[b]) + " at " +
                          std::to_string(b) + ")");
  }
}

bool runs_on_cuda(const DLDevice& device) {
  const CudaMemory memory = cuda_memory();
  return memory != CudaMemory::kNone &&
         device.device_type == (memory == CudaMemory::kHost ? kDLCPU : kDLCUDA);
}

void require_cpu(const DLDevice& device) {
  if (device.device_type == kDLCPU) return;
  throw py::type_error(
      std::string("mmbal_fast: tensors must be on cpu") +
      (cuda_memory() == CudaMemory::kNone ? ", this build has no CUDA kernels" : " or cuda") +
      " (got " + device_name(device) + ")");
}

std::string gradient_name(const std::string& op, py::handle names, int64_t index) {
  if (names.is_none()) return op + ": gradient " + position("grads", index);
  return op + ": gradient '" + std::string(py::str(py::object(names[py::int_(index)]))) + "'";
}

namespace {

// A tensor of a list. `name` is called for errors.
template <class Name>
View listed_tensor(py::handle object, Name&& name, DType* dtype) {
  const View tensor = view(object, name, true);
  *dtype = float_type(tensor, object, name);
  if (tensor.layout == Layout::kOverlapping) {
    throw std::runtime_error(name() + " must not share memory between its elements (got shape " +
                             std::string(py::str(py::list(object.attr("shape")))) + ", strides " +
                             std::string(py::str(object.attr("stride")())) + ")");
  }
  return tensor;
}

bool must_be_packed(const View& tensor) { return !tensor.dense() || tensor.negated; }

Gradient as_gradient(const View& tensor, DType dtype, int64_t row) {
  Gradient gradient{};
  gradient.data = tensor.data();
  gradient.count = tensor.count;
  gradient.dtype = dtype;
  gradient.row = row;
  return gradient;
}

}  // namespace

Gradients::Gradients(const std::string& op, const Sequence& list, py::handle names) {
  items.reserve(static_cast<size_t>(list.size()));
  for (int64_t i = 0; i < list.size(); ++i) {
    if (list[i].is_none()) continue;
    DType dtype;
    const View tensor = listed_tensor(list[i], [&] { return gradient_name(op, names, i); }, &dtype);
    if (tensor.count == 0) continue;
    if (must_be_packed(tensor)) gaps.push_back(i);
    if (items.empty()) first = tensor;
    mixed |= !tensor.same_device(first);
    items.push_back(as_gradient(tensor, dtype, i));
  }
}

py::object Gradients::unfit() const {
  if (mixed) return py::bool_(true);
  if (!gaps.empty()) return py::cast(gaps);
  return py::none();
}

void assign_modalities(const std::string& op, const Sequence& modality, int64_t listed,
                       int64_t count, py::handle names, std::vector<Gradient>& gradients) {
  if (modality.size() != listed) {
    throw py::value_error(op + ": modality must name one modality per gradient (got " +
                          std::to_string(modality.size()) + " for " + std::to_string(listed) + ")");
  }
  for (Gradient& gradient : gradients) {
    const auto what = [&] { return op + ": " + position("modality", gradient.row); };
    const int64_t m = integer(what, modality[gradient.row], INT64_MIN, INT64_MAX);
    if (m < 0 || m >= count) {
      throw py::value_error(gradient_name(op, names, gradient.row) +
                            " must belong to a modality from 0 to " + std::to_string(count - 1) +
                            " (got " + std::to_string(m) + ")");
    }
    gradient.modality = static_cast<int32_t>(m);
  }
}

// Long lists by their bytes: comparisons would take a fifth of a call's host side.
void sort_places(std::vector<Place>& places) {
  const auto before = [](const Place& a, const Place& b) { return a.address < b.address; };
  if (std::is_sorted(places.begin(), places.end(), before)) return;
  if (places.size() < 200) return std::stable_sort(places.begin(), places.end(), before);
  thread_local std::vector<Place> memory;
  std::vector<Place>& sorted = memory;  // found once, not at every use
  sorted.resize(places.size());
  uintptr_t differing = 0;
  for (const Place& place : places) differing |= place.address ^ places[0].address;
  for (size_t shift = 0; shift < 8 * sizeof differing; shift += 8) {
    const auto digit = [&](uintptr_t address) { return (address >> shift) & 0xff; };
    if (digit(differing) == 0) continue;
    uint32_t next[257] = {};
    for (const Place& place : places) ++next[digit(place.address) + 1];
    for (int d = 0; d < 256; ++d) next[d + 1] += next[d];
    for (const Place& place : places) sorted[next[digit(place.address)]++] = place;
    places.swap(sorted);
  }
}

Companions::Companions(const std::string& op, std::vector<std::string> lists,
                       std::vector<Sequence> sequences, py::handle names)
    : others(lists.size() - 1),
      op_(op),
      lists_(std::move(lists)),
      sequences_(std::move(sequences)),
      names_(names) {
  const size_t count = lists_.size();
  for (size_t l = 1; l < count; ++l) {
    if (sequences_[l].size() != listed()) {
      throw py::value_error(op + ": " + lists_[0] + " and " + lists_[l] +
                            " must be equally long (got " + std::to_string(listed()) + " and " +
                            std::to_string(sequences_[l].size()) + ")");
    }
  }
  std::vector<View> views(count);
  std::vector<DType> dtypes(count);
  for (int64_t row = 0; row < listed(); ++row) {
    bool complete = true;
    for (size_t l = 0; l < count; ++l) {
      const py::handle object = sequences_[l][row];
      if (object.is_none()) {
        complete = false;
        continue;
      }
      views[l] = listed_tensor(object, [&] { return name(l, row); }, &dtypes[l]);
      complete &= views[l].count != 0;
    }
    if (!complete) continue;
    const View& gradient = views[0];
    bool fits = !must_be_packed(gradient);
    for (size_t l = 1; l < count; ++l) {
      const View& other = views[l];
      if (shape_of(other) != shape_of(gradient)) {
        throw py::value_error(name(l, row) + " must have the shape of " + position(lists_[0], row) +
                              " (got " + to_string(shape_of(other)) + " and " +
                              to_string(shape_of(gradient)) + ")");
      }
      if (dtypes[l] != dtypes[0]) {
        throw py::value_error(name(l, row) + " must have the dtype of " + position(lists_[0], row) +
                              " (got " + dtype_name(sequences_[l][row]) + " and " +
                              dtype_name(sequences_[0][row]) + ")");
      }
      require_device(other, name(l, row), gradient, position(lists_[0], row));
      fits &= !must_be_packed(other);
      for (int32_t d = 0; d < gradient.tensor.ndim; ++d) {
        fits &=
            gradient.tensor.shape[d] == 1 || gradient.tensor.strides[d] == other.tensor.strides[d];
      }
      others[l - 1].push_back(other.data());
    }
    if (gradients.empty()) first = gradient;
    mixed_ |= !gradient.same_device(first);
    if (!fits) unfit_.push_back(row);
    gradients.push_back(as_gradient(gradient, dtypes[0], row));
  }
}

std::string Companions::name(size_t list, int64_t row) const {
  if (list == 0 && !names_.is_none()) return gradient_name(op_, names_, row);
  return op_ + ": " + position(lists_[list], row);
}

py::object Companions::unfit() const {
  if (mixed_) return py::bool_(true);
  if (!unfit_.empty()) return py::cast(unfit_);
  return py::none();
}

void Companions::require_apart() const {
  thread_local std::vector<Place> memory;
  std::vector<Place>& places = memory;
  const size_t count = gradients.size();
  places.clear();
  for (size_t i = 0; i < count; ++i) {
    places.push_back({reinterpret_cast<uintptr_t>(gradients[i].data), i});
  }
  for (size_t l = 0; l < others.size(); ++l) {
    for (size_t i = 0; i < count; ++i) {
      places.push_back({reinterpret_cast<uintptr_t>(others[l][i]), (l + 1) * count + i});
    }
  }
  sort_places(places);
  // The ends of the memory of all before: of any list, and of the one that is written.
  uintptr_t end = 0, end_of_written = 0;
  size_t last = 0, last_written = 0;
  for (const auto& [address, index] : places) {
    const bool written = index < count;
    const Gradient& item = gradients[index % count];
    if (address < (written ? end : end_of_written)) {
      const size_t pair[] = {index, written ? last : last_written};
      const auto [lower, upper] = std::minmax(pair[0], pair[1]);
      throw py::value_error(name(lower / count, gradients[lower % count].row) +
                            " must not share memory with another tensor (got " +
                            position(lists_[upper / count], gradients[upper % count].row) +
                            " beside it)");
    }
    const uintptr_t its_end = address + static_cast<uintptr_t>(item.count * size_of(item.dtype));
    if (its_end > end) {
      end = its_end;
      last = index;
    }
    if (written && its_end > end_of_written) {
      end_of_written = its_end;
      last_written = index;
    }
  }
}

}  // namespace mmbal
