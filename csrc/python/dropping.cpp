// Features dropped before a fusion.
#include "operations/dropping.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

const std::string kDropping = "drop_features: ";

// Samples, of which each is one block of memory, and where they go.
struct Rows {
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<int64_t> widths;
  std::vector<DType> dtypes;
  int64_t batch = 0;
  View first;

  Rows(const char* name, py::handle features, py::handle results) {
    const Sequence sources(features, "drop_features: features must be a sequence of tensors");
    const Sequence targets(results, "drop_features: results must be a sequence of tensors");
    if (sources.size() == 0 || sources.size() != targets.size()) {
      throw py::value_error(kDropping + name + " must be at least one, with as many results (got " +
                            std::to_string(sources.size()) + " and " +
                            std::to_string(targets.size()) + ")");
    }
    for (int64_t m = 0; m < sources.size(); ++m) {
      DType dtype, other;
      const View x = checked_float(kDropping + name, sources[m], &dtype);
      const View y = checked_float(kDropping + "results", targets[m], &other);
      if (m == 0) {
        first = x;
        batch = x.tensor.ndim > 0 ? x.tensor.shape[0] : 0;
      }
      const Shape shape = shape_of(x);
      if (shape.empty() || shape[0] != batch) {
        throw py::value_error(kDropping + name + " must have shape [" + std::to_string(batch) +
                              ", ...] (got " + to_string(shape) + ")");
      }
      int64_t width = 1;
      for (size_t d = 1; d < shape.size(); ++d) width *= shape[d];
      const Shape strides(x.tensor.strides, x.tensor.strides + x.tensor.ndim);
      if (x.count > 0 && (!x.dense() || (batch > 1 && strides[0] != width))) {
        throw py::value_error(kDropping + name +
                              " must be blocks of memory, one for each sample (got " + "shape " +
                              to_string(shape) + ", strides " + to_string(strides) + ")");
      }
      require_shape(y, kDropping + "results", shape);
      if (x.count > 0 && Shape(y.tensor.strides, y.tensor.strides + y.tensor.ndim) != strides) {
        throw py::value_error(kDropping + "results must lie in memory as what they are made of");
      }
      if (dtype != other)
        throw py::type_error(kDropping + "results must be of the type of " + name);
      require_device(x, kDropping + name, first, "the others");
      require_device(y, kDropping + "results", first, "the others");
      from.push_back(x.data());
      to.push_back(y.data());
      widths.push_back(width);
      dtypes.push_back(dtype);
    }
  }
  int64_t modalities() const { return static_cast<int64_t>(from.size()); }
  FeatureRows rows() const {
    return {from.data(), to.data(), widths.data(), dtypes.data(), modalities(), batch};
  }
  template <class T>
  T* beside(const char* name, const View& tensor) const {
    require_device(tensor, kDropping + name, first, "the features");
    return static_cast<T*>(tensor.data());
  }
  View vector(const char* name, py::handle object, const Shape& shape) const {
    return checked(kDropping + name, object, kDLFloat, 32, shape);
  }
};

void drop_forward(py::handle features, py::handle results, py::handle ratios, double base,
                  double strength, double apply, uint64_t seed, py::handle step, py::handle stream,
                  py::handle probabilities, py::handle factors, py::handle weight, bool advance,
                  int threads, py::handle workspace) {
  const Rows rows("features", features, results);
  const int64_t modalities = rows.modalities();
  View counter;
  const NoiseSource source = noise_source("drop_features", seed, step, &counter);
  if (counter.tensor.data) rows.beside<void>("step", counter);
  const int64_t own =
      integer([&] { return kDropping + "stream"; }, stream, 1, UINT32_MAX - modalities);
  DropFeatures args{};
  args.rows = rows.rows();
  args.dropping = {rows.beside<const float>("ratios", rows.vector("ratios", ratios, {modalities})),
                   base,
                   strength,
                   apply,
                   source,
                   static_cast<uint32_t>(own)};
  args.probabilities = rows.beside<float>(
      "probabilities", rows.vector("probabilities", probabilities, {modalities}));
  args.factors =
      rows.beside<float>("factors", rows.vector("factors", factors, {modalities, rows.batch}));
  const View weights = checked_float(kDropping + "weight", weight, &args.weight_dtype);
  require_shape(weights, kDropping + "weight", {rows.batch});
  if (weights.layout != Layout::kContiguous) {
    throw py::value_error(kDropping + "weight must be contiguous");
  }
  args.weight = rows.beside<void>("weight", weights);
  if (advance) {
    if (!counter.tensor.data) throw py::value_error(kDropping + "step must be a tensor to advance");
    args.advance = static_cast<int64_t*>(counter.data());
  }
  on_device_of(rows.first, threads, workspace,
               [&](const auto& device) { drop_features(args, device); });
}

void drop_backward(py::handle grads, py::handle results, py::handle factors, int threads) {
  const Rows rows("gradients", grads, results);
  const View kept = rows.vector("factors", factors, {rows.modalities(), rows.batch});
  const DropFeaturesBackward args{rows.rows(), rows.beside<const float>("factors", kept)};
  on_device_of(rows.first, threads, py::none(),
               [&](const auto& device) { drop_features_backward(args, device); });
}

}  // namespace

void bind_dropping(py::module_& m) {
  using namespace pybind11::literals;
  m.def("drop_features", &drop_forward, "features"_a, "results"_a, "ratios"_a, "base"_a,
        "strength"_a, "apply"_a, "seed"_a, "step"_a, "stream"_a, "probabilities"_a, "factors"_a,
        "weight"_a, "advance"_a, "threads"_a, "workspace"_a);
  m.def("drop_features_backward", &drop_backward, "grads"_a, "results"_a, "factors"_a, "threads"_a);
}

}  // namespace mmbal
