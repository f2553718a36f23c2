// Dot products over pairs of gradients.
#include "operations/gradient_dots.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

// None, or where the caller must step in; see Companions.
py::object gradient_dots_(py::handle first, py::handle second, py::handle out, int threads,
                          py::handle workspace) {
  const std::string op = "gradient_dots";
  const Companions pairs(op, {"first", "second"},
                         {{first, "gradient_dots: first must be a sequence of tensors"},
                          {second, "gradient_dots: second must be a sequence of tensors"}},
                         py::none());
  if (pairs.gradients.empty()) return py::none();
  if (py::object reason = pairs.unfit(); !reason.is_none()) return reason;
  const View result = checked(op + ": out", out, kDLFloat, 64, {pairs.listed(), 3});
  require_device(result, op + ": out", pairs.first, "the gradients");
  const GradientDots args{pairs.gradients.data(), pairs.others[0].data(), pairs.count(),
                          static_cast<double*>(result.data())};
  on_device_of(pairs.first, threads, workspace,
               [&](const auto& device) { gradient_dots(args, device); });
  return py::none();
}

}  // namespace

void bind_gradient_dots(py::module_& m) {
  using namespace pybind11::literals;
  m.def("gradient_dots", &gradient_dots_, "first"_a, "second"_a, "out"_a, "threads"_a,
        "workspace"_a);
}

}  // namespace mmbal
