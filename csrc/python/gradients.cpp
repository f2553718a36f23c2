// Operations on lists of gradients, and the noise.
#include <algorithm>
#include <vector>

#include "python/arguments.h"

namespace mmbal {
namespace {

// Keeps one of each gradient that is listed twice; other gradients that share memory are an error.
// For dense ones.
void drop_repeated(Gradients& gradients, py::handle names) {
  thread_local std::vector<Place> memory;
  std::vector<Place>& places = memory;
  std::vector<Gradient>& items = gradients.items;
  places.resize(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    places[i] = {reinterpret_cast<uintptr_t>(items[i].data), i};
  }
  sort_places(places);
  bool repeated = false;
  uintptr_t end = 0;  // of the memory of all before, which ends with that of `last`
  const Gradient* last = nullptr;
  for (const auto& [address, index] : places) {
    Gradient& item = items[index];
    if (address >= end) {
      last = &item;
      end = address + static_cast<uintptr_t>(item.count * size_of(item.dtype));
    } else if (item.data == last->data && item.count == last->count && item.dtype == last->dtype &&
               item.modality == last->modality) {
      item.data = nullptr;
      repeated = true;
    } else {
      const auto [before, after] = std::minmax(
          *last, item, [](const Gradient& a, const Gradient& b) { return a.row < b.row; });
      throw py::value_error(gradient_name("modulate_", names, after.row) +
                            " must belong to one modality and not share memory with another (got "
                            "modalities " +
                            std::to_string(before.modality) + " and " +
                            std::to_string(after.modality) + ", sizes " +
                            std::to_string(before.count) + " and " + std::to_string(after.count) +
                            ", the other " + position("grads", before.row) + ")");
    }
  }
  if (!repeated) return;
  const auto dropped = [](const Gradient& item) { return item.data == nullptr; };
  items.erase(std::remove_if(items.begin(), items.end(), dropped), items.end());
}

py::object moments(py::handle grads, py::handle out, py::handle names, int threads,
                   py::handle workspace) {
  const std::string op = "gradient_moments";
  const Sequence list(grads, "gradient_moments: grads must be a sequence of tensors");
  const Gradients gradients(op, list, names);
  if (gradients.items.empty()) return py::none();
  if (py::object reason = gradients.unfit(); !reason.is_none()) return reason;
  const View result = checked(op + ": out", out, kDLFloat, 64, {list.size(), 3});
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
  const View k = checked_vector(op + ": coefficients", coefficients, kDLFloat, 32);
  Gradients gradients(op, list, names);
  const auto fill = [&](py::handle values, const char* name, const char* rule, int64_t most,
                        auto&& set) {
    if (values.is_none()) return;
    const Sequence numbers(values, rule);
    if (numbers.size() != list.size()) {
      throw py::value_error(std::string(rule) + " (got " + std::to_string(numbers.size()) +
                            " for " + std::to_string(list.size()) + " gradients)");
    }
    for (Gradient& gradient : gradients.items) {
      const auto what = [&] { return op + ": " + position(name, gradient.row); };
      set(gradient, integer(what, numbers[gradient.row], 0, most));
    }
  };
  assign_modalities(op, modalities, list.size(), k.count, names, gradients.items);
  for (Gradient& gradient : gradients.items) gradient.id = static_cast<uint32_t>(gradient.row);
  fill(tensor_ids, "tensor_ids", "modulate_: tensor_ids must hold one id per gradient", UINT32_MAX,
       [](Gradient& g, int64_t id) { g.id = static_cast<uint32_t>(id); });
  fill(offsets, "offsets", "modulate_: offsets must hold one offset per gradient", INT64_MAX,
       [&](Gradient& g, int64_t offset) {
         require_offset([&] { return op + ": " + position("offsets", g.row); }, offset, g.count);
         g.offset = offset;
       });
  View counter{};
  const NoiseSource source = noise_source(op, seed, step, &counter);
  const bool counts = advance && source.step_pointer != nullptr;
  const View& where = gradients.items.empty() ? k : gradients.first;
  if (gradients.gaps.empty()) drop_repeated(gradients, names);
  if (py::object reason = gradients.unfit(); !reason.is_none()) return reason;
  require_device(k, op + ": coefficients", where, "the gradients");
  if (source.step_pointer) require_device(counter, op + ": step", where, "the gradients");
  Modulation args{};
  args.gradients = gradients.items.data();
  args.count = gradients.count();
  args.coefficients = static_cast<const float*>(k.data());
  args.noise = noise;
  args.eps = eps;
  args.source = source;
  args.advance = counts ? static_cast<int64_t*>(counter.data()) : nullptr;
  args.single_launch = single_launch;
  if (!given_moments.is_none()) {
    const View rows = checked(op + ": moments", given_moments, kDLFloat, 64, {list.size(), 3});
    require_device(rows, op + ": moments", where, "the gradients");
    args.moments = static_cast<const double*>(rows.data());
  }
  args.status = optional_status(op, status, where);
  if (!inverse_scale.is_none()) {
    const auto number = [&](const char* name, py::handle object) {
      const View tensor = checked_one(op + ": " + name, object, kDLFloat, 32);
      require_device(tensor, op + ": " + name, where, "the gradients");
      return static_cast<float*>(tensor.data());
    };
    args.inverse_scale = number("inverse_scale", inverse_scale);
    args.found_inf = number("found_inf", found_inf);
  }
  if (gradients.items.empty() && !counts) return py::none();
  on_device_of(where, threads, workspace, [&](const auto& device) { modulate(args, device); });
  return py::none();
}

void noise_like(py::handle out, uint64_t seed, py::handle step, py::handle tensor_id,
                py::handle offset, int threads) {
  const std::string op = "noise_like";
  Noise args{};
  const View tensor = checked_float(op + ": tensor", out, &args.target.dtype);
  args.target.data = tensor.data();
  args.target.count = tensor.count;
  const auto named = [&](const char* name) { return [=] { return op + ": " + name; }; };
  args.target.id = static_cast<uint32_t>(integer(named("tensor_id"), tensor_id, 0, UINT32_MAX));
  args.target.offset = integer(named("offset"), offset, 0, INT64_MAX);
  require_offset(named("offset"), args.target.offset, tensor.count);
  if (!tensor.dense()) throw py::value_error("noise_like: tensor must be dense");
  View counter{};
  args.source = noise_source(op, seed, step, &counter);
  if (args.source.step_pointer) require_device(counter, op + ": step", tensor, "the tensor");
  if (tensor.count == 0) return;
  on_device_of(tensor, threads, py::none(),
               [&](const auto& device) { fill_with_noise(args, device); });
}

std::vector<uint32_t> philox_words(const std::vector<uint32_t>& counter,
                                   const std::vector<uint32_t>& key, int rounds, bool on_cuda) {
  std::vector<uint32_t> words(4);
  if (counter.size() != 4 || key.size() != 2 || (rounds != 7 && rounds != 10)) {
    throw py::value_error("philox4x32: needs 4 counter words, 2 key words, 7 or 10 rounds");
  }
  PhiloxBlock block{{}, {key[0], key[1]}, rounds, words.data()};
  std::copy_n(counter.begin(), 4, block.counter);
  if (on_cuda && cuda_memory() == CudaMemory::kNone) {
    throw std::runtime_error("philox4x32: " + cuda_unavailable());
  }
  on_cuda ? philox(block, Cuda{}) : philox(block, Cpu{1});
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
  m.def("philox4x32", &philox_words, "counter"_a, "key"_a, "rounds"_a, "on_cuda"_a);
}

}  // namespace mmbal
