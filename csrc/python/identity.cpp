// Whether modules still hold the objects that they held before, by identity.
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

}  // namespace

void bind_identity(py::module_& m) {
  using namespace pybind11::literals;
  m.def("unchanged", &unchanged, "registries"_a, "entries"_a);
}

}  // namespace mmbal
