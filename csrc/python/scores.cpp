// Scores of logits, ratios and coefficients.
#include "operations/scores.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

template <class Code>
Code code_of(const std::string& what, int code, int count) {
  if (code >= 0 && code < count) return static_cast<Code>(code);
  throw py::value_error(what + " must be a number from 0 to " + std::to_string(count - 1) +
                        " (got " + std::to_string(code) + ")");
}

Rule rule_of(int code) { return code_of<Rule>("modulation_coefficients: rule", code, kRules); }

// A state [3, M] and what it is derived from.
Derivation derivation_of(const std::string& op, const View& state, int64_t modalities,
                         py::handle totals, py::handle past, py::handle steps, bool ratios,
                         float alpha, float beta, int rule) {
  Derivation args{static_cast<float*>(state.data()),
                  modalities,
                  nullptr,
                  nullptr,
                  nullptr,
                  ratios,
                  alpha,
                  beta,
                  rule_of(rule)};
  const auto beside = [&](const char* name, const View& tensor) {
    require_device(tensor, op + ": " + name, state, "the state");
    return tensor.data();
  };
  if (!totals.is_none()) {
    args.totals = static_cast<const float*>(
        beside("totals", checked(op + ": totals", totals, kDLFloat, 32, {modalities + 1})));
  }
  if (!past.is_none()) {
    args.past = static_cast<const float*>(
        beside("past", checked(op + ": past", past, kDLFloat, 32, {modalities})));
    args.steps = static_cast<const int64_t*>(
        beside("steps", checked_one(op + ": steps", steps, kDLInt, 64)));
  } else if (args.rule == Rule::kAgm || args.rule == Rule::kMetric) {
    throw py::type_error(op + ": past must be a tensor for a rule that remembers (got None)");
  }
  return args;
}

// The logits of a batch and their labels as they are, where kernels can take them so: class
// indexes of contiguous matrices.
bool fits(const Sequence& list, py::handle target, const View& state) {
  View labels;
  if (!is_tensor(target) || !has_plain_memory(target) || !export_view(target, &labels))
    return false;
  const DLDataType& type = labels.tensor.dtype;
  if (type.code != kDLInt || type.bits != 64 || labels.tensor.ndim != 1 || labels.negated ||
      labels.layout != Layout::kContiguous || !labels.same_device(state)) {
    return false;
  }
  int64_t classes = 0;
  for (int64_t m = 0; m < list.size(); ++m) {
    View rows;
    DType dtype;
    if (!is_tensor(list[m]) || !has_plain_memory(list[m]) || !export_view(list[m], &rows) ||
        !has_float_type(rows.tensor.dtype, &dtype) || rows.tensor.ndim != 2 || rows.negated ||
        rows.layout != Layout::kContiguous || !rows.same_device(state)) {
      return false;
    }
    if (m == 0) classes = rows.tensor.shape[1];
    if (rows.tensor.shape[0] != labels.count || rows.tensor.shape[1] != classes || classes < 2) {
      return false;
    }
  }
  return list.size() > 0;
}

// True, and nothing is done, where `as_they_are` is set and the arguments do not fit; else None.
py::object scores_(py::handle logits, py::handle target, bool multi_label, int64_t ignore_index,
                   int statistic, py::handle state, py::handle totals, py::handle past,
                   py::handle steps, bool accumulate, float alpha, float beta, int rule,
                   py::handle status, int threads, py::handle workspace, bool as_they_are) {
  const std::string op = "contribution_scores";
  const Sequence list(logits, "contribution_scores: logits must be a sequence of tensors");
  const int64_t modalities = list.size();
  if (modalities == 0) {
    if (as_they_are) return py::bool_(true);
    throw py::value_error(op + ": logits must hold at least one tensor (got none)");
  }
  std::vector<const void*> rows(static_cast<size_t>(modalities));
  std::vector<const void*> soft;
  std::vector<DType> dtypes(rows.size());
  const std::string what_state = op + ": state";
  const bool alone = view(state, [&] { return what_state; }).tensor.ndim == 1;  // scores alone
  const View result =
      checked(what_state, state, kDLFloat, 32, alone ? Shape{modalities} : Shape{3, modalities});
  if (alone && (!totals.is_none() || rule != static_cast<int>(Rule::kNone))) {
    throw py::value_error(what_state + " must be of shape [3, M] for a rule (got [M])");
  }
  if (as_they_are && !fits(list, target, result)) return py::bool_(true);
  Shape shape;
  for (int64_t m = 0; m < modalities; ++m) {
    const std::string what = op + ": logits";
    const View tensor = checked_rows(what, list[m], result, &dtypes[m]);
    if (m == 0) shape = shape_of(tensor);
    require_shape(tensor, what, shape);
    rows[m] = tensor.data();
  }
  const Derivation derivation =
      derivation_of(op, result, modalities, totals, past, steps, !alone, alpha, beta, rule);
  Scores args{rows.data(),
              dtypes.data(),
              shape[0],
              shape[1],
              nullptr,
              nullptr,
              multi_label,
              ignore_index,
              code_of<Statistic>(op + ": statistic", statistic, kStatistics),
              accumulate,
              derivation.totals ? const_cast<float*>(derivation.totals) : derivation.state,
              derivation,
              nullptr};
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
    if (multi_label) throw py::type_error(op + ": target must be soft labels for multi_label");
    const View labels = checked(op + ": target", target, kDLInt, 64, {shape[0]});
    require_device(labels, op + ": target", result, "the logits");
    args.labels = static_cast<const int64_t*>(labels.data());
    require_labels(op, labels, args.batch, args.classes, ignore_index);
  }
  args.status = optional_status(op, status, result);
  on_device_of(result, threads, workspace, [&](const auto& device) { score(args, device); });
  return py::none();
}

void derive_(py::handle state, py::handle totals, py::handle past, py::handle steps, bool ratios,
             float alpha, float beta, int rule) {
  const std::string op = "discrepancy_ratios";
  const int64_t modalities = view(state, [&] { return op + ": state"; }).count / 3;
  const View memory = checked(op + ": state", state, kDLFloat, 32, {3, modalities});
  const Derivation args =
      derivation_of(op, memory, modalities, totals, past, steps, ratios, alpha, beta, rule);
  on_device_of(memory, 1, py::none(), [&](const auto& device) { derive(args, device); });
}

void remember_(py::handle past, py::handle steps, py::handle scores, py::handle totals,
               py::handle counts, bool mean) {
  const std::string op = "remember_";
  const View kept = checked_vector(op + ": past", past, kDLFloat, 32);
  const View number = checked_one(op + ": steps", steps, kDLInt, 64);
  const View now = checked(op + ": scores", scores, kDLFloat, 32, {kept.count});
  const View sums = checked(op + ": totals", totals, kDLFloat, 32, {kept.count + 1});
  for (const View* each : {&number, &now, &sums}) {
    require_device(*each, op + ": every tensor", kept, "the past");
  }
  Memory args{static_cast<float*>(kept.data()),
              static_cast<int64_t*>(number.data()),
              static_cast<const float*>(now.data()),
              static_cast<const float*>(sums.data()),
              nullptr,
              kept.count,
              mean};
  if (!counts.is_none()) {
    const View flag = checked_one(op + ": counts", counts, kDLBool, 8);
    require_device(flag, op + ": counts", kept, "the past");
    args.counts = static_cast<const bool*>(flag.data());
  }
  on_device_of(kept, 1, py::none(), [&](const auto& device) { remember(args, device); });
}

}  // namespace

void bind_scores(py::module_& m) {
  using namespace pybind11::literals;
  m.def("scores_", &scores_, "logits"_a, "target"_a, "multi_label"_a, "ignore_index"_a,
        "statistic"_a, "state"_a, "totals"_a, "past"_a, "steps"_a, "accumulate"_a, "alpha"_a,
        "beta"_a, "rule"_a, "status"_a, "threads"_a, "workspace"_a, "as_they_are"_a);
  m.def("derive_", &derive_, "state"_a, "totals"_a, "past"_a, "steps"_a, "ratios"_a, "alpha"_a,
        "beta"_a, "rule"_a);
  m.def("remember_", &remember_, "past"_a, "steps"_a, "scores"_a, "totals"_a, "counts"_a, "mean"_a);
}

}  // namespace mmbal
