// Gradients pulled towards earlier weights.
#include "operations/pull.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

// None, or where the caller must step in; see Companions.
py::object pull_(py::handle grads, py::handle weights, py::handle anchors, py::handle coefficients,
                 py::handle modality, py::handle squares, py::handle names, int threads,
                 py::handle workspace) {
  const std::string op = "pull_";
  Companions lists(op, {"grads", "weights", "anchors"},
                   {{grads, "pull_: grads must be a sequence of tensors"},
                    {weights, "pull_: weights must be a sequence of tensors"},
                    {anchors, "pull_: anchors must be a sequence of tensors"}},
                   names);
  const Sequence modalities(modality, "pull_: modality must be a sequence of integers");
  const View beta = checked_vector(op + ": coefficients", coefficients, kDLFloat, 32);
  assign_modalities(op, modalities, lists.listed(), beta.count, names, lists.gradients);
  if (lists.gradients.empty()) return py::none();
  if (py::object reason = lists.unfit(); !reason.is_none()) return reason;
  lists.require_apart();
  require_device(beta, op + ": coefficients", lists.first, "the gradients");
  const View result = checked(op + ": squares", squares, kDLFloat, 64, {lists.listed()});
  require_device(result, op + ": squares", lists.first, "the gradients");
  const Pull args{lists.gradients.data(),
                  lists.others[0].data(),
                  lists.others[1].data(),
                  lists.count(),
                  static_cast<const float*>(beta.data()),
                  static_cast<double*>(result.data())};
  on_device_of(lists.first, threads, workspace, [&](const auto& device) { pull(args, device); });
  return py::none();
}

}  // namespace

void bind_pull(py::module_& m) {
  using namespace pybind11::literals;
  m.def("pull_", &pull_, "grads"_a, "weights"_a, "anchors"_a, "coefficients"_a, "modality"_a,
        "squares"_a, "names"_a, "threads"_a, "workspace"_a);
}

}  // namespace mmbal
