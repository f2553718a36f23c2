// Scores of logits, ratios and coefficients.
#include "operations/scores.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

Rule rule_of(int code) {
  if (code >= 0 && code < kRules) return static_cast<Rule>(code);
  throw py::value_error("modulation_coefficients: rule must be a number from 0 to " +
                        std::to_string(kRules - 1) + " (got " + std::to_string(code) + ")");
}

void scores_(py::handle logits, py::handle target, int64_t ignore_index, py::handle state,
             bool accumulate, float alpha, int rule, py::handle status, int threads,
             py::handle workspace) {
  const std::string op = "contribution_scores";
  const Sequence list(logits, "contribution_scores: logits must be a sequence of tensors");
  const int64_t modalities = list.size();
  if (modalities == 0) {
    throw py::value_error(op + ": logits must hold at least one tensor (got none)");
  }
  std::vector<const void*> rows(static_cast<size_t>(modalities));
  std::vector<const void*> soft;
  std::vector<DType> dtypes(rows.size());
  const View result = checked(op + ": state", state, kDLFloat, 32, {3, modalities});
  Shape shape;
  for (int64_t m = 0; m < modalities; ++m) {
    const std::string what = op + ": logits";
    const View tensor = checked_rows(what, list[m], result, &dtypes[m]);
    if (m == 0) shape = shape_of(tensor);
    require_shape(tensor, what, shape);
    rows[m] = tensor.data();
  }
  Scores args{
      rows.data(), dtypes.data(), modalities,   shape[0],   shape[1],
      nullptr,     nullptr,       ignore_index, accumulate, static_cast<float*>(result.data()),
      alpha,       rule_of(rule), nullptr};
  if (py::isinstance<py::tuple>(target)) {
    const std::string what = op + ": target";
    const Sequence weights(target, "");
    if (weights.size() != modalities) {
      throw py::value_error(what + " must be soft labels for each of the logits (got " +
                            std::to_string(weights.size()) + " for " + std::to_string(modalities) +
                            ")");
    }
    for (int64_t m = 0; m < modalities; ++m) {
      DType dtype;
      const View tensor = checked_rows(what, weights[m], result, &dtype);
      require_shape(tensor, what, shape);
      if (dtype != dtypes[m]) throw py::type_error(what + " must be of the logits' type");
      soft.push_back(tensor.data());
    }
    args.soft = soft.data();
  } else {
    const View labels = checked(op + ": target", target, kDLInt, 64, {shape[0]});
    require_device(labels, op + ": target", result, "the logits");
    args.labels = static_cast<const int64_t*>(labels.data());
    require_labels(op, labels, args.batch, args.classes, ignore_index);
  }
  args.status = optional_status(op, status, result);
  on_device_of(result, threads, workspace, [&](const auto& device) { score(args, device); });
}

void derive_(py::handle state, bool ratios, float alpha, int rule) {
  const std::string what = "discrepancy_ratios: state";
  const int64_t modalities = view(state, [&] { return what; }).count / 3;
  const View memory = checked(what, state, kDLFloat, 32, {3, modalities});
  const Derivation args{static_cast<float*>(memory.data()), modalities, ratios, alpha,
                        rule_of(rule)};
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
