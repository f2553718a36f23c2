// Operations on lists of gradients, and the noise.
#include <algorithm>

#include "python/arguments.h"

namespace mmbal {
namespace {

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
        throw py::value_error(gradient_name("modulate_", names, gradient.row) +
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

py::object moments(py::handle grads, py::handle out, py::handle names, int threads,
                   py::handle workspace) {
  const std::string op = "gradient_moments";
  const Sequence list(grads, "gradient_moments: grads must be a sequence of tensors");
  const Gradients gradients(op, list, names);
  if (gradients.items.empty()) return py::none();
  if (py::object reason = gradients.unfit(); !reason.is_none()) return reason;
  const View result = checked(op + ": out", out, kDLFloat, 64);
  require_device(result, op + ": out", gradients.first, "the gradients");
  const Measurement args{gradients.items.data(), gradients.count(),
                         static_cast<double*>(result.data())};
  on_device_of(gradients.first, threads, workspace,
               [&](const auto& device) { measure(args, device); });
  return py::none();
}

py::object modulate_(py::handle grads, py::handle coefficients, py::handle modality, double noise,
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
  Gradients gradients(op, list, names);
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
      throw py::value_error(gradient_name(op, names, gradient.row) +
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
  if (py::object reason = gradients.unfit(); !reason.is_none()) return reason;
  drop_repeated(gradients, names);
  require_device(k, op + ": coefficients", where, "the gradients");
  if (step_is_tensor) require_device(counter, op + ": step", where, "the gradients");
  Modulation args{};
  args.gradients = gradients.items.data();
  args.count = gradients.count();
  args.coefficients = static_cast<const float*>(k.data());
  args.noise = noise;
  args.eps = eps;
  args.source = source;
  args.advance = advance ? counter_memory : nullptr;
  args.single_launch = single_launch;
  if (!given_moments.is_none()) {
    const View rows = checked(op + ": moments", given_moments, kDLFloat, 64);
    require_device(rows, op + ": moments", where, "the gradients");
    if (rows.count != 3 * list.size()) {
      throw py::value_error("modulate_: moments must hold a row of 3 per gradient (got " +
                            std::to_string(rows.count) + " values for " +
                            std::to_string(list.size()) + " gradients)");
    }
    args.moments = static_cast<const double*>(rows.data());
  }
  args.status = optional_status(op, status, where);
  if (!inverse_scale.is_none()) {
    const auto number = [&](const char* name, py::handle object) {
      const View tensor = checked(op + ": " + name, object, kDLFloat, 32);
      require_device(tensor, op + ": " + name, where, "the gradients");
      return static_cast<float*>(tensor.data());
    };
    args.inverse_scale = number("inverse_scale", inverse_scale);
    args.found_inf = number("found_inf", found_inf);
  }
  on_device_of(where, threads, workspace, [&](const auto& device) { modulate(args, device); });
  return py::none();
}

void noise_like(py::handle out, uint64_t seed, py::handle step, uint32_t tensor_id, int64_t offset,
                int threads) {
  const std::string op = "noise_like";
  Noise args{};
  const View tensor = checked_float(op + ": tensor", out, &args.target.dtype);
  args.target.data = tensor.data();
  args.target.count = tensor.count;
  args.target.id = tensor_id;
  args.target.offset = offset;
  args.source.seed = seed;
  if (tensor.layout != Layout::kDense) throw py::value_error("noise_like: tensor must be dense");
  if (PyLong_Check(step.ptr())) {
    args.source.step = step.cast<int64_t>();
  } else {
    const View counter = checked(op + ": step", step, kDLInt, 64);
    require_device(counter, op + ": step", tensor, "the tensor");
    args.source.step_pointer = static_cast<const int64_t*>(counter.data());
  }
  if (tensor.count == 0) return;
  on_device_of(tensor, threads, py::none(),
               [&](const auto& device) { fill_with_noise(args, device); });
}

std::vector<uint32_t> philox4x32(const std::vector<uint32_t>& counter,
                                 const std::vector<uint32_t>& key, int rounds, bool on_cuda) {
  std::vector<uint32_t> words(4);
  if (counter.size() != 4 || key.size() != 2 || (rounds != 7 && rounds != 10)) {
    throw py::value_error("philox4x32: needs 4 counter words, 2 key words, 7 or 10 rounds");
  }
  PhiloxBlock block{{}, {key[0], key[1]}, rounds, words.data()};
  std::copy_n(counter.begin(), 4, block.counter);
  if constexpr (kWithCuda) {
    if (on_cuda) return philox(block, Cuda{}), words;
  }
  if (on_cuda) throw std::runtime_error("philox4x32: " + cuda_unavailable());
  philox(block, Cpu{1});
  return words;
}

}  // namespace

void bind_gradients(py::module_& m) {
  using namespace pybind11::literals;
  m.def("moments", &moments, "grads"_a, "out"_a, "names"_a, "threads"_a, "workspace"_a);
  m.def("modulate_", &modulate_, "grads"_a, "coefficients"_a, "modality"_a, "noise"_a, "seed"_a,
        "step"_a, "tensor_ids"_a, "offsets"_a, "moments"_a, "eps"_a, "status"_a, "advance"_a,
        "names"_a, "threads"_a, "workspace"_a, "inverse_scale"_a = py::none(),
        "found_inf"_a = py::none(), "single_launch"_a = false);
  m.def("noise_", &noise_like, "out"_a, "seed"_a, "step"_a, "tensor_id"_a, "offset"_a, "threads"_a);
  m.def("philox4x32", &philox4x32, "counter"_a, "key"_a, "rounds"_a, "on_cuda"_a);
}

}  // namespace mmbal
