// MMPareto's combination of two gradients.
#include "operations/pareto.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

// None, or where the caller must step in: as Companions says, True also where there is no pair.
py::object pareto_(py::handle grads, py::handle own, py::handle modality, double gamma,
                   py::handle dots, py::handle scale, py::handle out, py::handle names, int threads,
                   py::handle workspace) {
  const std::string op = "pareto_";
  Companions lists(op, {"grads", "own"},
                   {{grads, "pareto_: grads must be a sequence of tensors"},
                    {own, "pareto_: own must be a sequence of tensors"}},
                   names);
  const Sequence modalities(modality, "pareto_: modality must be a sequence of integers");
  const View result = view(out, [&] { return op + ": out"; });
  const int64_t count = result.tensor.ndim == 2 ? result.tensor.shape[1] : 0;
  checked(op + ": out", out, kDLFloat, 64, {2, count});
  assign_modalities(op, modalities, lists.listed(), count, names, lists.gradients);
  if (lists.gradients.empty()) return py::bool_(true);
  if (py::object reason = lists.unfit(); !reason.is_none()) return reason;
  lists.require_apart();
  require_device(result, op + ": out", lists.first, "the gradients");
  Pareto args{};
  args.gradients = lists.gradients.data();
  args.own = lists.others[0].data();
  args.count = lists.count();
  args.gamma = gamma;
  args.modalities = count;
  args.out = static_cast<double*>(result.data());
  if (!dots.is_none()) {
    const View rows = checked(op + ": dots", dots, kDLFloat, 64, {lists.listed(), 3});
    require_device(rows, op + ": dots", lists.first, "the gradients");
    args.dots = static_cast<const double*>(rows.data());
  }
  if (!scale.is_none()) {
    const View factor = checked_one(op + ": scale", scale, kDLFloat, 32);
    require_device(factor, op + ": scale", lists.first, "the gradients");
    args.scale = static_cast<const float*>(factor.data());
  }
  on_device_of(lists.first, threads, workspace, [&](const auto& device) { pareto(args, device); });
  return py::none();
}

}  // namespace

void bind_pareto(py::module_& m) {
  using namespace pybind11::literals;
  m.def("pareto_", &pareto_, "grads"_a, "own"_a, "modality"_a, "gamma"_a, "dots"_a, "scale"_a,
        "out"_a, "names"_a, "threads"_a, "workspace"_a);
}

}  // namespace mmbal
