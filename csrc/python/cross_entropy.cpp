// The blended cross-entropy.
#include "operations/cross_entropy.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

// The tensors [rows, classes] of several heads.
struct Heads {
  std::vector<void*> data;
  std::vector<DType> dtypes;
  int64_t rows = 0;
  int64_t classes = 0;

  Heads(const std::string& what, py::handle tensors, const View& beside) {
    const Sequence list(tensors, "blended_cross_entropy: the heads must be a sequence of tensors");
    for (int64_t k = 0; k < list.size(); ++k) {
      DType dtype;
      const View tensor = checked_float(what, list[k], &dtype);
      require_device(tensor, what, beside, "the target");
      if (tensor.layout != Layout::kDense) throw py::value_error(what + " must be contiguous");
      data.push_back(tensor.data());
      dtypes.push_back(dtype);
      rows = tensor.tensor.shape[0];
      classes = tensor.tensor.shape[1];
    }
  }
};

// What forward and backward have in common; `logits` must outlive it.
void read_common(CrossEntropy& args, const Heads& logits, const View& target, py::handle weights,
                 double smoothing, int64_t ignore_index, py::handle normalizers, py::handle count) {
  const std::string op = "blended_cross_entropy: ";
  args.logits = logits.data.data();
  args.dtypes = logits.dtypes.data();
  args.heads = static_cast<int64_t>(logits.data.size());
  args.rows = logits.rows;
  args.classes = logits.classes;
  args.ignore_index = ignore_index;
  args.smoothing = smoothing;
  const int bits = args.wide() ? 64 : 32;
  const DLDataType& type = target.tensor.dtype;
  if (type.code == kDLInt && type.bits == 64) {
    args.labels = static_cast<const int64_t*>(target.data());
  } else if (type.code == kDLFloat && type.bits == bits) {
    args.soft = target.data();
  } else {
    throw py::type_error(op + "target must be int64, or of the losses' type");
  }
  args.weights = static_cast<const double*>(checked(op + "weights", weights, kDLFloat, 64).data());
  args.normalizers = checked(op + "normalizers", normalizers, kDLFloat, bits).data();
  args.count = static_cast<int64_t*>(checked(op + "count", count, kDLInt, 64).data());
}

void forward(py::handle logits, py::handle target, py::handle weights, double smoothing,
             int64_t ignore_index, py::handle loss, py::handle losses, py::handle normalizers,
             py::handle count, int threads, py::handle workspace) {
  const std::string op = "blended_cross_entropy";
  const View labels = view(target, [&] { return op + ": target"; });
  const Heads heads(op + ": logits", logits, labels);
  CrossEntropy args{};
  read_common(args, heads, labels, weights, smoothing, ignore_index, normalizers, count);
  const int bits = args.wide() ? 64 : 32;
  args.loss = checked(op + ": loss", loss, kDLFloat, bits).data();
  args.losses = checked(op + ": losses", losses, kDLFloat, bits).data();
  if (args.labels) require_labels(op, labels, args.rows, args.classes, ignore_index);
  on_device_of(labels, threads, workspace,
               [&](const auto& device) { cross_entropy(args, device); });
}

void backward(py::handle grad, py::handle logits, py::handle target, py::handle weights,
              double smoothing, int64_t ignore_index, py::handle normalizers, py::handle count,
              py::handle grads, int threads) {
  const std::string op = "blended_cross_entropy";
  const View labels = view(target, [&] { return op + ": target"; });
  const Heads heads(op + ": logits", logits, labels);
  const Heads results(op + ": gradients", grads, labels);
  CrossEntropyBackward args{};
  read_common(args, heads, labels, weights, smoothing, ignore_index, normalizers, count);
  args.grad = checked(op + ": gradient of the loss", grad, kDLFloat, args.wide() ? 64 : 32).data();
  args.grads = results.data.data();
  on_device_of(labels, threads, py::none(),
               [&](const auto& device) { cross_entropy_backward(args, device); });
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  using namespace pybind11::literals;
  m.def("cross_entropy", &forward, "logits"_a, "target"_a, "weights"_a, "smoothing"_a,
        "ignore_index"_a, "loss"_a, "losses"_a, "normalizers"_a, "count"_a, "threads"_a,
        "workspace"_a);
  m.def("cross_entropy_backward", &backward, "grad"_a, "logits"_a, "target"_a, "weights"_a,
        "smoothing"_a, "ignore_index"_a, "normalizers"_a, "count"_a, "grads"_a, "threads"_a);
}

}  // namespace mmbal
