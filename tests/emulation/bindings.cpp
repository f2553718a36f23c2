// What tests ask of the stand-in itself, as part of the module that is built on it.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace emulation {

void bind(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Graph>(m, "Graph")
      .def("__len__", [](const Graph& graph) { return graph.launches; })
      .def("replay", [](const Graph& graph) {
        const cudaError_t error = graph.replay();
        if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
      });
  m.def("begin_capture", &begin_capture);
  m.def("end_capture", &end_capture);
}

}  // namespace emulation
