// Scores of logits, ratios and coefficients.
#include "operations/scores.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

void scores_(py::handle logits, py::handle target, int64_t ignore_index, py::handle state,
             bool accumulate, float alpha, int rule, py::handle status, int threads,
             py::handle workspace) {
  const std::string op = "contribution_scores";
  const Sequence list(logits, "contribution_scores: logits must be a sequence of tensors");
  const int64_t modalities = list.size();
  std::vector<const void*> rows(static_cast<size_t>(modalities));
  std::vector<const void*> soft;
  std::vector<DType> dtypes(rows.size());
  const View result = checked(op + ": state", state, kDLFloat, 32);
  const auto logits_view = [&](py::handle object, const char* what, DType* dtype) {
    const View tensor = checked_float(op + ": " + what, object, dtype);
    require_device(tensor, op + ": " + what, result, "the state");
    return tensor;
  };
  View first{};
  for (int64_t m = 0; m < modalities; ++m) {
    const View tensor = logits_view(list[m], "logits", &dtypes[m]);
    if (m == 0) first = tensor;
    rows[m] = tensor.data();
  }
  Scores args{rows.data(),
              dtypes.data(),
              modalities,
              first.tensor.shape[0],
              first.tensor.shape[1],
              nullptr,
              nullptr,
              ignore_index,
              accumulate,
              static_cast<float*>(result.data()),
              alpha,
              static_cast<Rule>(rule),
              nullptr};
  if (py::isinstance<py::tuple>(target)) {
    for (py::handle labels : target) {
      DType dtype;
      soft.push_back(logits_view(labels, "target", &dtype).data());
    }
    args.soft = soft.data();
  } else {
    const View labels = checked(op + ": target", target, kDLInt, 64);
    require_device(labels, op + ": target", result, "the logits");
    args.labels = static_cast<const int64_t*>(labels.data());
    require_labels(op, labels, args.batch, args.classes, ignore_index);
  }
  args.status = optional_status(op, status, result);
  on_device_of(result, threads, workspace, [&](const auto& device) { score(args, device); });
}

void derive_(py::handle state, bool ratios, float alpha, int rule) {
  const View memory = checked("discrepancy_ratios: state", state, kDLFloat, 32);
  const Derivation args{static_cast<float*>(memory.data()), memory.count / 3, ratios, alpha,
                        static_cast<Rule>(rule)};
  on_device_of(memory, 1, py::none(), [&](const auto& device) { derive(args, device); });
}

}  // namespace

void bind_scores(py::module_& m) {
  using namespace pybind11::literals;
  m.def("scores_", &scores_, "logits"_a, "target"_a, "ignore_index"_a, "state"_a, "accumulate"_a,
        "alpha"_a, "rule"_a, "status"_a, "threads"_a, "workspace"_a);
  m.def("derive_", &derive_, "state"_a, "ratios"_a, "alpha"_a, "rule"_a);
}

}  // namespace mmbal
