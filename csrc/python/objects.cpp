// Lists of a thousand Python objects, without Python's loops.
#include <pybind11/pybind11.h>

namespace mmbal {
namespace {

namespace py = pybind11;

// Whether the dicts together hold the very objects of `entries`, in that order: a few nanoseconds
// an entry, where Python takes fifty.
bool unchanged(const py::list& registries, const py::list& entries) {
  const Py_ssize_t expected = PyList_GET_SIZE(entries.ptr());
  Py_ssize_t seen = 0;
  const Py_ssize_t count = PyList_GET_SIZE(registries.ptr());
  for (Py_ssize_t index = 0; index < count; ++index) {
    PyObject* registry = PyList_GET_ITEM(registries.ptr(), index);
    if (!PyDict_Check(registry)) throw py::type_error("unchanged: registries must be dicts");
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(registry, &position, &key, &value)) {
      if (seen == expected || PyList_GET_ITEM(entries.ptr(), seen) != value) return false;
      ++seen;
    }
  }
  return seen == expected;
}

// Those of a list or tuple that are not None.
py::list present(const py::sequence& objects) {
  const py::object kept = py::reinterpret_steal<py::object>(
      PySequence_Fast(objects.ptr(), "present: objects must be a list or tuple"));
  if (!kept) throw py::error_already_set();
  py::list found;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(kept.ptr());
  for (Py_ssize_t index = 0; index < count; ++index) {
    PyObject* object = PySequence_Fast_GET_ITEM(kept.ptr(), index);
    if (object != Py_None && PyList_Append(found.ptr(), object) != 0) throw py::error_already_set();
  }
  return found;
}

// One of torch's own attributes of a tensor, without a look-up where no subclass may have another.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(py::str(name).release().ptr()) {
    const py::module_ torch = py::module_::import("torch");
    plain_ = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());
    parameter_ = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
    const py::object own = torch.attr("_C").attr("TensorBase").attr(name);
    if (Py_IS_TYPE(own.ptr(), &PyGetSetDescr_Type)) {
      getter_ = reinterpret_cast<PyGetSetDescrObject*>(own.ptr())->d_getset;
    }
  }
  py::object of(PyObject* tensor) const {
    const bool own = Py_TYPE(tensor) == parameter_ || Py_TYPE(tensor) == plain_;
    PyObject* value = own && getter_ != nullptr ? getter_->get(tensor, getter_->closure)
                                                : PyObject_GetAttr(tensor, name_);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  PyObject* name_;
  PyTypeObject* plain_;
  PyTypeObject* parameter_;
  PyGetSetDef* getter_ = nullptr;
};

// The gradients of parameters; None of those that have none or are frozen.
py::list gradients_of(const py::list& parameters) {
  static const Attribute* grad = new Attribute("grad");
  static const Attribute* trained = new Attribute("requires_grad");
  const py::tuple kept(parameters);  // a subclass may run what it likes
  const Py_ssize_t count = PyTuple_GET_SIZE(kept.ptr());
  py::list found(static_cast<size_t>(count));
  for (Py_ssize_t index = 0; index < count; ++index) {
    PyObject* parameter = PyTuple_GET_ITEM(kept.ptr(), index);
    py::object gradient =
        trained->of(parameter).is(py::handle(Py_True)) ? grad->of(parameter) : py::none();
    PyList_SET_ITEM(found.ptr(), index, gradient.release().ptr());
  }
  return found;
}

}  // namespace

void bind_objects(py::module_& m) {
  using namespace pybind11::literals;
  m.def("gradients_of", &gradients_of, "parameters"_a);
  m.def("present", &present, "objects"_a);
  m.def("unchanged", &unchanged, "registries"_a, "entries"_a);
}

}  // namespace mmbal
