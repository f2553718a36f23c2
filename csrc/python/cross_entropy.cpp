// The blended cross-entropy.
#include "operations/cross_entropy.h"

#include <algorithm>

#include "python/arguments.h"

namespace mmbal {
namespace {

// The logits [rows, classes] of several heads, or their gradients.
struct Heads {
  std::vector<void*> data;
  std::vector<DType> dtypes;
  Shape shape;

  Heads(const std::string& what, py::handle tensors, const View& beside) {
    const Sequence list(tensors, "blended_cross_entropy: the heads must be a sequence of tensors");
    if (list.size() == 0) throw py::value_error(what + " must be of at least one head (got none)");
    for (int64_t k = 0; k < list.size(); ++k) {
      DType dtype;
      const View tensor = checked_rows(what, list[k], beside, &dtype);
      if (k == 0) shape = shape_of(tensor);
      require_shape(tensor, what, shape);
      data.push_back(tensor.data());
      dtypes.push_back(dtype);
    }
    const auto wide = std::count(dtypes.begin(), dtypes.end(), DType::kFloat64);
    if (wide != 0 && wide != list.size()) {
      throw py::type_error(what + " must all be float64 or none of them");
    }
  }
};

constexpr const char* kOp = "blended_cross_entropy: ";

std::string named(const char* argument) { return std::string(kOp) + argument; }

// What forward and backward have in common; `logits` must outlive it.
void read_common(CrossEntropy& args, const Heads& logits, const View& target, py::handle weights,
                 double smoothing, int64_t ignore_index, py::handle normalizers, py::handle count) {
  args.logits = logits.data.data();
  args.dtypes = logits.dtypes.data();
  args.heads = static_cast<int64_t>(logits.data.size());
  args.rows = logits.shape[0];
  args.classes = logits.shape[1];
  args.ignore_index = ignore_index;
  args.smoothing = smoothing;
  const int bits = args.wide() ? 64 : 32;
  const DLDataType& type = target.tensor.dtype;
  if (type.code == kDLInt && type.bits == 64) {
    require_shape(target, named("target"), {args.rows});
    args.labels = static_cast<const int64_t*>(target.data());
  } else if (type.code == kDLFloat && type.bits == bits) {
    require_shape(target, named("target"), logits.shape);
    args.soft = target.data();
  } else {
    throw py::type_error(named("target must be int64, or of the losses' type"));
  }
  if (target.layout != Layout::kContiguous) {
    throw py::value_error(named("target must be contiguous"));
  }
  const auto beside = [&](const char* name, const View& tensor) {
    require_device(tensor, named(name), target, "the target");
    return tensor.data();
  };
  args.weights = static_cast<const double*>(
      beside("weights", checked(named("weights"), weights, kDLFloat, 64, {args.heads})));
  args.normalizers = beside("normalizers", checked(named("normalizers"), normalizers, kDLFloat,
                                                   bits, {2, args.heads, args.rows}));
  args.count =
      static_cast<int64_t*>(beside("count", checked_one(named("count"), count, kDLInt, 64)));
}

void blended_forward(py::handle logits, py::handle target, py::handle weights, double smoothing,
                     int64_t ignore_index, py::handle loss, py::handle losses,
                     py::handle normalizers, py::handle count, int threads, py::handle workspace) {
  const View labels = view(target, [] { return named("target"); });
  const Heads heads(named("logits"), logits, labels);
  CrossEntropy args{};
  read_common(args, heads, labels, weights, smoothing, ignore_index, normalizers, count);
  const int bits = args.wide() ? 64 : 32;
  const View sum = checked_one(named("loss"), loss, kDLFloat, bits);
  const View each = checked(named("losses"), losses, kDLFloat, bits, {args.heads});
  require_device(sum, named("loss"), labels, "the target");
  require_device(each, named("losses"), labels, "the target");
  args.loss = sum.data();
  args.losses = each.data();
  if (args.labels) {
    require_labels("blended_cross_entropy", labels, args.rows, args.classes, ignore_index);
  }
  on_device_of(labels, threads, workspace,
               [&](const auto& device) { cross_entropy(args, device); });
}

void blended_backward(py::handle grad, py::handle logits, py::handle target, py::handle weights,
                      double smoothing, int64_t ignore_index, py::handle normalizers,
                      py::handle count, py::handle grads, int threads) {
  const View labels = view(target, [] { return named("target"); });
  const Heads heads(named("logits"), logits, labels);
  const Heads results(named("gradients"), grads, labels);
  if (results.shape != heads.shape || results.dtypes != heads.dtypes) {
    throw py::value_error(named("gradients must be of the shapes and types of the logits"));
  }
  CrossEntropyBackward args{};
  read_common(args, heads, labels, weights, smoothing, ignore_index, normalizers, count);
  const View outer =
      checked_one(named("gradient of the loss"), grad, kDLFloat, args.wide() ? 64 : 32);
  require_device(outer, named("gradient of the loss"), labels, "the target");
  args.grad = outer.data();
  args.grads = results.data.data();
  on_device_of(labels, threads, py::none(),
               [&](const auto& device) { cross_entropy_backward(args, device); });
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  using namespace pybind11::literals;
  m.def("cross_entropy", &blended_forward, "logits"_a, "target"_a, "weights"_a, "smoothing"_a,
        "ignore_index"_a, "loss"_a, "losses"_a, "normalizers"_a, "count"_a, "threads"_a,
        "workspace"_a);
  m.def("cross_entropy_backward", &blended_backward, "grad"_a, "logits"_a, "target"_a, "weights"_a,
        "smoothing"_a, "ignore_index"_a, "normalizers"_a, "count"_a, "grads"_a, "threads"_a);
}

}  // namespace mmbal
