// Dot products over pairs of gradients.
#include "operations/gradient_dots.h"

#include <algorithm>

#include "python/arguments.h"

namespace mmbal {
namespace {

// None, or where the caller must step in: True for several devices, or the positions of pairs that
// must be packed, or lie in memory in different orders.
py::object gradient_dots_(py::handle first, py::handle second, py::handle out, int threads,
                          py::handle workspace) {
  const std::string op = "gradient_dots";
  const Sequence lists[] = {{first, "gradient_dots: first must be a sequence of tensors"},
                            {second, "gradient_dots: second must be a sequence of tensors"}};
  const Gradients firsts(op + ": first", lists[0], py::none());
  const Gradients seconds(op + ": second", lists[1], py::none());
  if (lists[0].size() != lists[1].size()) {
    throw py::value_error(op + ": first and second must be equally long (got " +
                          std::to_string(lists[0].size()) + " and " +
                          std::to_string(lists[1].size()) + ")");
  }
  std::vector<int64_t> unfit;
  std::vector<Gradient> a, b;
  auto next_first = firsts.items.begin();
  auto next_second = seconds.items.begin();
  for (int64_t row = 0; row < lists[0].size(); ++row) {
    const py::handle pair[] = {lists[0][row], lists[1][row]};
    if (pair[0].is_none() || pair[1].is_none()) continue;
    const auto name = [&] { return op + ": pair " + std::to_string(row); };
    const View x = view(pair[0], name, true);
    const View y = view(pair[1], name, true);
    if (x.count == 0 || y.count == 0) continue;
    if (shape_of(x) != shape_of(y)) {
      throw py::value_error(name() + " must have one shape (got " + to_string(shape_of(x)) +
                            " and " + to_string(shape_of(y)) + ")");
    }
    if (x.tensor.dtype.code != y.tensor.dtype.code || x.tensor.dtype.bits != y.tensor.dtype.bits) {
      throw py::value_error(name() + " must have one dtype (got " + dtype_name(pair[0]) + " and " +
                            dtype_name(pair[1]) + ")");
    }
    require_device(y, name(), x, "both");
    while (next_first->row < row) ++next_first;
    while (next_second->row < row) ++next_second;
    a.push_back(*next_first);
    b.push_back(*next_second);
    const auto packed = [&](const Gradients& list) {
      return !std::binary_search(list.gaps.begin(), list.gaps.end(), row);
    };
    bool fits = packed(firsts) && packed(seconds);
    for (int32_t d = 0; d < x.tensor.ndim; ++d) {
      fits &= x.tensor.shape[d] == 1 || x.tensor.strides[d] == y.tensor.strides[d];
    }
    if (!fits) unfit.push_back(row);
  }
  if (a.empty()) return py::none();
  if (firsts.mixed) return py::bool_(true);
  if (!unfit.empty()) return py::cast(unfit);
  const View result = checked(op + ": out", out, kDLFloat, 64, {lists[0].size(), 3});
  require_device(result, op + ": out", firsts.first, "the gradients");
  const GradientDots args{a.data(), b.data(), static_cast<int64_t>(a.size()),
                          static_cast<double*>(result.data())};
  on_device_of(firsts.first, threads, workspace,
               [&](const auto& device) { gradient_dots(args, device); });
  return py::none();
}

}  // namespace

void bind_gradient_dots(py::module_& m) {
  using namespace pybind11::literals;
  m.def("gradient_dots", &gradient_dots_, "first"_a, "second"_a, "out"_a, "threads"_a,
        "workspace"_a);
}

}  // namespace mmbal
