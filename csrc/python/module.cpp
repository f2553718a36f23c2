// The native module: checks arguments, turns tensors into memory, runs the CPU or CUDA code.
// mmbal_fast.functional documents the operations; these are its private other half.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/dispatch.h"
#include "operations.h"
#include "python/tensors.h"

#if __has_include("build_config.h")
#include "build_config.h"
#endif

#ifndef MMBAL_MODULE_NAME
#define MMBAL_MODULE_NAME _C
#endif

namespace mmbal {
namespace {

// What the name of a list's element is in errors: the caller's own name for it or its position.
std::string element_name(const std::string& op, py::handle names, size_t index) {
  if (names.is_none()) return op + ": gradient grads[" + std::to_string(index) + "]";
  return op + ": gradient '" + std::string(py::str(py::object(names[py::int_(index)]))) + "'";
}

View checked(const std::string& what, py::handle object, DLDataTypeCode code, int bits) {
  const View tensor = view(object, [&] { return what; });
  const DLDataType& type = tensor.tensor.dtype;
  if (type.code != code || type.bits != bits) {
    throw py::type_error(what + " must be " + (code == kDLFloat ? "float" : "int") +
                         std::to_string(bits) + " (got " + dtype_name(object) + ")");
  }
  if (tensor.layout != Layout::kDense) throw py::value_error(what + " must be contiguous");
  return tensor;
}

void require_device(const View& tensor, const std::string& what, const View& other,
                    const std::string& others) {
  if (tensor.same_device(other)) return;
  throw py::value_error(what + " must be on the device of " + others + " (got " +
                        device_name(tensor.tensor.device) + " and " +
                        device_name(other.tensor.device) + ")");
}

// A list of gradients as memory. Empty ones and None are dropped.
struct Gradients {
  std::vector<Gradient> items;
  std::vector<int64_t> gaps;  // positions of tensors that are not dense
  View first;                 // any of them, for the device
  bool mixed = false;         // more than one device
};

class Sequence {
 public:
  Sequence(py::handle object, const char* what)
      : items_(py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), what))) {
    if (!items_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(items_.ptr()); }
  py::handle operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(items_.ptr(), i); }
  int64_t integer(int64_t i) const {
    const int64_t value = PyLong_AsLongLong((*this)[i].ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  py::object items_;
};

Gradients gather(const std::string& op, const Sequence& list, py::handle names) {
  Gradients result;
  result.items.reserve(static_cast<size_t>(list.size()));
  bool any = false;
  for (int64_t i = 0; i < list.size(); ++i) {
    const py::handle object = list[i];
    if (object.is_none()) continue;
    const auto name = [&] { return element_name(op, names, static_cast<size_t>(i)); };
    const View tensor = view(object, name);
    Gradient gradient{};
    if (!gradient_dtype(tensor.tensor.dtype, &gradient.dtype)) {
      throw py::type_error(name() + " must be float32, float64, float16 or bfloat16 (got " +
                           dtype_name(object) + ")");
    }
    if (tensor.layout == Layout::kOverlapping) {
      throw std::runtime_error(name() + " must not share memory between its elements (got shape " +
                               std::string(py::str(py::list(object.attr("shape")))) + ", strides " +
                               std::string(py::str(object.attr("stride")())) + ")");
    }
    if (tensor.count == 0) continue;
    if (tensor.layout == Layout::kSparse) result.gaps.push_back(i);
    if (!any) result.first = tensor;
    any = true;
    result.mixed |= !tensor.same_device(result.first);
    gradient.data = tensor.data();
    gradient.count = tensor.count;
    gradient.row = i;
    result.items.push_back(gradient);
  }
  return result;
}

// Keeps one of each gradient that is listed twice; the same memory in two modalities is an error.
void drop_repeated(Gradients& gradients, py::handle names) {
  thread_local std::vector<int64_t> table;
  size_t capacity = 64;
  while (capacity < 2 * gradients.items.size()) capacity *= 2;
  table.assign(capacity, -1);
  size_t kept = 0;
  for (const Gradient& gradient : gradients.items) {
    size_t slot = (reinterpret_cast<uintptr_t>(gradient.data) >> 4) * 0x9E3779B97F4A7C15u;
    slot = (slot >> 20) & (capacity - 1);
    while (table[slot] >= 0 && gradients.items[table[slot]].data != gradient.data) {
      slot = (slot + 1) & (capacity - 1);
    }
    if (table[slot] >= 0) {
      const Gradient& before = gradients.items[table[slot]];
      if (before.modality != gradient.modality || before.count != gradient.count) {
        throw py::value_error(element_name("modulate_", names, static_cast<size_t>(gradient.row)) +
                              " must belong to one modality and not share memory with another (got "
                              "modalities " +
                              std::to_string(before.modality) + " and " +
                              std::to_string(gradient.modality) + ", sizes " +
                              std::to_string(before.count) + " and " +
                              std::to_string(gradient.count) + ")");
      }
      continue;
    }
    table[slot] = static_cast<int64_t>(kept);
    gradients.items[kept++] = gradient;
  }
  gradients.items.resize(kept);
}

// Runs on_cpu() or on_cuda(queue), whichever the tensors' device calls for.
template <class OnCpu, class OnCuda>
void run(const View& tensor, int64_t workspace_bytes, py::handle workspace, OnCpu&& on_cpu,
         OnCuda&& on_cuda) {
  const DLDevice& device = tensor.tensor.device;
  if (device.device_type == kKernelDevice) {
    cuda::Queue queue{device.device_id, nullptr, nullptr};
    if (device.device_type == kDLCUDA) queue.stream = current_stream(device);
    if (workspace_bytes > 0) {
      const py::object memory = workspace(workspace_bytes, device.device_id);
      queue.workspace = view(memory, [] { return std::string("workspace"); }).data();
    }
    py::gil_scoped_release release;
    on_cuda(queue);
    return;
  }
  if (!tensor.on_cpu()) {
    throw py::type_error("mmbal_fast: tensors must be on cpu or cuda (got " + device_name(device) +
                         ")");
  }
  py::gil_scoped_release release;
  on_cpu();
}

int64_t gradients_workspace(const Gradients& gradients) {
  return cuda::workspace_bytes(gradients.items.data(),
                               static_cast<int64_t>(gradients.items.size()));
}

int32_t* optional_status(const std::string& op, py::handle status, const View& beside) {
  if (status.is_none()) return nullptr;
  const View tensor = checked(op + ": status", status, kDLInt, 32);
  require_device(tensor, op + ": status", beside, "the tensors");
  return static_cast<int32_t*>(tensor.data());
}

// Where the caller must step in: positions of tensors with gaps, or true for several devices.
py::object unfit(const Gradients& gradients) {
  if (gradients.mixed) return py::bool_(true);
  if (!gradients.gaps.empty()) return py::cast(gradients.gaps);
  return py::none();
}

py::object moments(py::handle grads, py::handle out, py::handle names, int threads,
                   py::handle workspace) {
  const std::string op = "gradient_moments";
  const Sequence list(grads, "gradient_moments: grads must be a sequence of tensors");
  const Gradients gradients = gather(op, list, names);
  if (gradients.items.empty()) return py::none();
  if (py::object reason = unfit(gradients); !reason.is_none()) return reason;
  const View result = checked(op + ": out", out, kDLFloat, 64);
  require_device(result, op + ": out", gradients.first, "the gradients");
  const auto count = static_cast<int64_t>(gradients.items.size());
  auto* rows = static_cast<double*>(result.data());
  run(
      gradients.first, gradients_workspace(gradients), workspace,
      [&] { cpu::moments(gradients.items.data(), count, rows, threads); },
      [&](const cuda::Queue& queue) { cuda::moments(gradients.items.data(), count, rows, queue); });
  return py::none();
}

py::object modulate(py::handle grads, py::handle coefficients, py::handle modality, double noise,
                    uint64_t seed, py::handle step, py::handle tensor_ids, py::handle offsets,
                    py::handle given_moments, double eps, py::handle status, bool advance,
                    py::handle names, int threads, py::handle workspace, py::handle inverse_scale,
                    py::handle found_inf, bool single_launch) {
  const std::string op = "modulate_";
  const Sequence list(grads, "modulate_: grads must be a sequence of tensors");
  const Sequence modalities(modality, "modulate_: modality must be a sequence of integers");
  const View k = checked(op + ": coefficients", coefficients, kDLFloat, 32);
  if (modalities.size() != list.size()) {
    throw py::value_error("modulate_: modality must name one modality per gradient (got " +
                          std::to_string(modalities.size()) + " for " +
                          std::to_string(list.size()) + ")");
  }
  Gradients gradients = gather(op, list, names);
  const auto fill = [&](py::handle values, const char* what, auto&& set) {
    if (values.is_none()) return;
    const Sequence numbers(values, what);
    if (numbers.size() != list.size()) {
      throw py::value_error(std::string(what) + " (got " + std::to_string(numbers.size()) +
                            " for " + std::to_string(list.size()) + " gradients)");
    }
    for (Gradient& gradient : gradients.items) set(gradient, numbers.integer(gradient.row));
  };
  for (Gradient& gradient : gradients.items) {
    const int64_t m = modalities.integer(gradient.row);
    if (m < 0 || m >= k.count) {
      throw py::value_error(element_name(op, names, static_cast<size_t>(gradient.row)) +
                            " must belong to a modality from 0 to " + std::to_string(k.count - 1) +
                            " (got " + std::to_string(m) + ")");
    }
    gradient.modality = static_cast<int32_t>(m);
    gradient.id = static_cast<uint32_t>(gradient.row);
  }
  fill(tensor_ids, "modulate_: tensor_ids must hold one id per gradient",
       [](Gradient& g, int64_t id) { g.id = static_cast<uint32_t>(id); });
  fill(offsets, "modulate_: offsets must hold one offset per gradient",
       [](Gradient& g, int64_t offset) { g.offset = offset; });
  const bool step_is_tensor = !PyLong_Check(step.ptr());
  View counter{};
  if (step_is_tensor) counter = checked(op + ": step", step, kDLInt, 64);
  auto* counter_memory = step_is_tensor ? static_cast<int64_t*>(counter.data()) : nullptr;
  const NoiseSource source{seed, step_is_tensor ? 0 : step.cast<int64_t>(), counter_memory};
  if (gradients.items.empty() && !(advance && step_is_tensor)) return py::none();
  const View& where = gradients.items.empty() ? counter : gradients.first;
  if (py::object reason = unfit(gradients); !reason.is_none()) return reason;
  drop_repeated(gradients, names);
  require_device(k, op + ": coefficients", where, "the gradients");
  if (step_is_tensor) require_device(counter, op + ": step", where, "the gradients");
  Modulation modulation{
      static_cast<const float*>(k.data()), noise,   eps,     source,       nullptr, nullptr,
      advance ? counter_memory : nullptr,  nullptr, nullptr, single_launch};
  if (!given_moments.is_none()) {
    const View rows = checked(op + ": moments", given_moments, kDLFloat, 64);
    require_device(rows, op + ": moments", where, "the gradients");
    if (rows.count != 3 * list.size()) {
      throw py::value_error("modulate_: moments must hold a row of 3 per gradient (got " +
                            std::to_string(rows.count) + " values for " +
                            std::to_string(list.size()) + " gradients)");
    }
    modulation.moments = static_cast<const double*>(rows.data());
  }
  modulation.status = optional_status(op, status, where);
  if (!inverse_scale.is_none()) {
    const auto number = [&](const char* name, py::handle object) {
      const View tensor = checked(op + ": " + name, object, kDLFloat, 32);
      require_device(tensor, op + ": " + name, where, "the gradients");
      return static_cast<float*>(tensor.data());
    };
    modulation.inverse_scale = number("inverse_scale", inverse_scale);
    modulation.found_inf = number("found_inf", found_inf);
  }
  const auto count = static_cast<int64_t>(gradients.items.size());
  run(
      where, gradients_workspace(gradients), workspace,
      [&] { cpu::modulate(gradients.items.data(), count, modulation, threads); },
      [&](const cuda::Queue& queue) {
        cuda::modulate(gradients.items.data(), count, modulation, queue);
      });
  return py::none();
}

void noise(py::handle out, uint64_t seed, py::handle step, uint32_t tensor_id, int64_t offset,
           int threads) {
  const std::string op = "noise_like";
  const View tensor = view(out, [&] { return op + ": tensor"; });
  Gradient target{tensor.data(), tensor.count, DType::kFloat32, 0, tensor_id, offset, 0};
  if (!gradient_dtype(tensor.tensor.dtype, &target.dtype)) {
    throw py::type_error("noise_like: tensor must be float32, float64, float16 or bfloat16 (got " +
                         dtype_name(out) + ")");
  }
  if (tensor.layout != Layout::kDense) throw py::value_error("noise_like: tensor must be dense");
  NoiseSource source{seed, 0, nullptr};
  if (PyLong_Check(step.ptr())) {
    source.step = step.cast<int64_t>();
  } else {
    const View counter = checked(op + ": step", step, kDLInt, 64);
    require_device(counter, op + ": step", tensor, "the tensor");
    source.step_pointer = static_cast<const int64_t*>(counter.data());
  }
  if (tensor.count == 0) return;
  run(
      tensor, 0, py::none(), [&] { cpu::noise(target, source, threads); },
      [&](const cuda::Queue& queue) { cuda::noise(target, source, queue); });
}

// On the CPU; kernels of a device do not wait for the host to look.
void require_labels(const std::string& op, const View& labels, int64_t count, int64_t classes,
                    int64_t ignore_index) {
  if (labels.tensor.device.device_type == kKernelDevice) return;
  const auto* label = static_cast<const int64_t*>(labels.data());
  for (int64_t b = 0; b < count; ++b) {
    if (label[b] == ignore_index || (label[b] >= 0 && label[b] < classes)) continue;
    throw py::index_error(op + ": target must be in [0, " + std::to_string(classes) +
                          ") or ignore_index (got " + std::to_string(label[b]) + " at " +
                          std::to_string(b) + ")");
  }
}

void scores(py::handle logits, py::handle target, int64_t ignore_index, py::handle state,
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
    const View tensor = view(object, [&] { return op + ": " + what; });
    if (!gradient_dtype(tensor.tensor.dtype, dtype)) {
      throw py::type_error(op + ": " + what +
                           " must be float32, float64, float16 or bfloat16 (got " +
                           dtype_name(object) + ")");
    }
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
  run(
      result, cuda::scores_workspace_bytes(modalities, args.batch), workspace,
      [&] { cpu::scores(args, threads); },
      [&](const cuda::Queue& queue) { cuda::scores(args, queue); });
}

void derive(py::handle state, bool ratios, float alpha, int rule) {
  const View memory = checked("discrepancy_ratios: state", state, kDLFloat, 32);
  const Derivation args{static_cast<float*>(memory.data()), memory.count / 3, ratios, alpha,
                        static_cast<Rule>(rule)};
  run(
      memory, 0, py::none(), [&] { cpu::derive(args); },
      [&](const cuda::Queue& queue) { cuda::derive(args, queue); });
}

// The tensors [rows, classes] of several heads.
struct Heads {
  std::vector<void*> data;
  std::vector<DType> dtypes;
  int64_t rows = 0;
  int64_t classes = 0;

  Heads(const std::string& what, py::handle tensors, const View& beside) {
    const Sequence list(tensors, "blended_cross_entropy: the heads must be a sequence of tensors");
    for (int64_t k = 0; k < list.size(); ++k) {
      const View tensor = view(list[k], [&] { return what; });
      require_device(tensor, what, beside, "the target");
      DType dtype;
      if (!gradient_dtype(tensor.tensor.dtype, &dtype)) {
        throw py::type_error(what + " must be float32, float64, float16 or bfloat16 (got " +
                             dtype_name(list[k]) + ")");
      }
      if (tensor.layout != Layout::kDense) throw py::value_error(what + " must be contiguous");
      data.push_back(tensor.data());
      dtypes.push_back(dtype);
      rows = tensor.tensor.shape[0];
      classes = tensor.tensor.shape[1];
    }
  }
};

// What forward and backward have in common; `logits` must outlive it.
CrossEntropy cross_entropy_arguments(const Heads& logits, const View& target, py::handle weights,
                                     double smoothing, int64_t ignore_index, py::handle normalizers,
                                     py::handle count) {
  const std::string op = "blended_cross_entropy: ";
  CrossEntropy args{};
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
  return args;
}

void cross_entropy(py::handle logits, py::handle target, py::handle weights, double smoothing,
                   int64_t ignore_index, py::handle loss, py::handle losses, py::handle normalizers,
                   py::handle count, int threads, py::handle workspace) {
  const std::string op = "blended_cross_entropy";
  const View labels = view(target, [&] { return op + ": target"; });
  const Heads heads(op + ": logits", logits, labels);
  CrossEntropy args =
      cross_entropy_arguments(heads, labels, weights, smoothing, ignore_index, normalizers, count);
  const int bits = args.wide() ? 64 : 32;
  args.loss = checked(op + ": loss", loss, kDLFloat, bits).data();
  args.losses = checked(op + ": losses", losses, kDLFloat, bits).data();
  if (args.labels) require_labels(op, labels, args.rows, args.classes, ignore_index);
  run(
      labels, cuda::cross_entropy_workspace_bytes(args.heads, args.rows), workspace,
      [&] { cpu::cross_entropy(args, threads); },
      [&](const cuda::Queue& queue) { cuda::cross_entropy(args, queue); });
}

void cross_entropy_backward(py::handle grad, py::handle logits, py::handle target,
                            py::handle weights, double smoothing, int64_t ignore_index,
                            py::handle normalizers, py::handle count, py::handle grads,
                            int threads) {
  const std::string op = "blended_cross_entropy";
  const View labels = view(target, [&] { return op + ": target"; });
  const Heads heads(op + ": logits", logits, labels);
  const Heads results(op + ": gradients", grads, labels);
  CrossEntropy args =
      cross_entropy_arguments(heads, labels, weights, smoothing, ignore_index, normalizers, count);
  args.grad = checked(op + ": gradient of the loss", grad, kDLFloat, args.wide() ? 64 : 32).data();
  args.grads = results.data.data();
  run(
      labels, 0, py::none(), [&] { cpu::cross_entropy_backward(args, threads); },
      [&](const cuda::Queue& queue) { cuda::cross_entropy_backward(args, queue); });
}

void accumulate_speeds(py::handle moments, py::handle membership, py::handle totals,
                       py::handle active, py::handle finite) {
  const std::string op = "learning speed";
  const View rows = checked(op + ": moments", moments, kDLFloat, 64);
  const View members = checked(op + ": membership", membership, kDLFloat, 64);
  const View sums = checked(op + ": totals", totals, kDLFloat, 64);
  const View flag = checked(op + ": finite", finite, kDLBool, 8);
  for (const View* each : {&members, &sums, &flag}) {
    require_device(*each, op + ": every tensor", rows, "the moments");
  }
  const int64_t tensors = sums.count ? members.count / sums.count : 0;
  if (members.count != sums.count * tensors || rows.count != 6 * tensors) {
    throw py::value_error(op + ": moments must be [2, T, 3] and membership [G, T] (got " +
                          std::to_string(rows.count) + ", " + std::to_string(members.count) +
                          " and " + std::to_string(sums.count) + " elements)");
  }
  Speeds args{static_cast<const double*>(rows.data()),
              static_cast<const double*>(members.data()),
              static_cast<double*>(sums.data()),
              sums.count,
              tensors,
              nullptr,
              static_cast<bool*>(flag.data())};
  if (!active.is_none()) {
    const View gate = checked(op + ": active", active, kDLBool, 8);
    require_device(gate, op + ": active", rows, "the moments");
    args.active = static_cast<const bool*>(gate.data());
  }
  run(
      rows, 0, py::none(), [&] { cpu::accumulate_speeds(args); },
      [&](const cuda::Queue& queue) { cuda::accumulate_speeds(args, queue); });
}

std::vector<uint32_t> philox(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key,
                             int rounds, bool on_cuda) {
  std::vector<uint32_t> words(4);
  if (counter.size() != 4 || key.size() != 2 || (rounds != 7 && rounds != 10)) {
    throw py::value_error("philox4x32: needs 4 counter words, 2 key words, 7 or 10 rounds");
  }
  (on_cuda ? cuda::philox : cpu::philox)(counter.data(), key.data(), rounds, words.data());
  return words;
}

py::dict build_info() {
  py::dict info;
#if defined(MMBAL_BUILD_VERSION)
  info["version"] = MMBAL_BUILD_VERSION;
  info["compiler"] = MMBAL_BUILD_COMPILER;
  info["flags"] = MMBAL_BUILD_FLAGS;
#endif
  info["emulated"] =
#if defined(MMBAL_CUDA_EMULATED)
      true;
#else
      false;
#endif
#if defined(MMBAL_WITH_CUDA)
  info["cuda"] = true;
#if defined(MMBAL_BUILD_CUDA_VERSION)
  info["cuda_version"] = MMBAL_BUILD_CUDA_VERSION;
  info["cuda_architectures"] = MMBAL_BUILD_CUDA_ARCHITECTURES;
#endif
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace mmbal

#if defined(MMBAL_CUDA_EMULATED)
namespace emulation {
void bind(pybind11::module_& m);  // what tests ask of the stand-in for CUDA
}
#endif

PYBIND11_MODULE(MMBAL_MODULE_NAME, m) {
  using namespace pybind11::literals;
  using namespace mmbal;
  m.doc() = "Native kernels of mmbal_fast; use mmbal_fast.functional.";
  kernels();  // an unusable MMBAL_CPU_ISA fails here, once
  m.def("moments", &moments, "grads"_a, "out"_a, "names"_a, "threads"_a, "workspace"_a);
  m.def("modulate_", &modulate, "grads"_a, "coefficients"_a, "modality"_a, "noise"_a, "seed"_a,
        "step"_a, "tensor_ids"_a, "offsets"_a, "moments"_a, "eps"_a, "status"_a, "advance"_a,
        "names"_a, "threads"_a, "workspace"_a, "inverse_scale"_a = py::none(),
        "found_inf"_a = py::none(), "single_launch"_a = false);
  m.def("noise_", &noise, "out"_a, "seed"_a, "step"_a, "tensor_id"_a, "offset"_a, "threads"_a);
  m.def("scores_", &scores, "logits"_a, "target"_a, "ignore_index"_a, "state"_a, "accumulate"_a,
        "alpha"_a, "rule"_a, "status"_a, "threads"_a, "workspace"_a);
  m.def("derive_", &derive, "state"_a, "ratios"_a, "alpha"_a, "rule"_a);
  m.def("cross_entropy", &cross_entropy, "logits"_a, "target"_a, "weights"_a, "smoothing"_a,
        "ignore_index"_a, "loss"_a, "losses"_a, "normalizers"_a, "count"_a, "threads"_a,
        "workspace"_a);
  m.def("cross_entropy_backward", &cross_entropy_backward, "grad"_a, "logits"_a, "target"_a,
        "weights"_a, "smoothing"_a, "ignore_index"_a, "normalizers"_a, "count"_a, "grads"_a,
        "threads"_a);
  m.def("accumulate_speeds_", &accumulate_speeds, "moments"_a, "membership"_a, "totals"_a,
        "active"_a, "finite"_a);
  m.def("philox4x32", &philox, "counter"_a, "key"_a, "rounds"_a, "on_cuda"_a);
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return std::string(kernels().name); });
  m.def("cpu_isas", &supported_isas);
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_unavailable", &cuda::unavailable);
#if defined(MMBAL_CUDA_EMULATED)
  emulation::bind(m);
#endif
}
