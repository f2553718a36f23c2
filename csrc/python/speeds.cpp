// The conditional learning speed.
#include "operations/speeds.h"

#include "python/arguments.h"

namespace mmbal {
namespace {

void accumulate_speeds_(py::handle moments, py::handle membership, py::handle totals,
                        py::handle active, py::handle finite) {
  const std::string op = "learning speed";
  const View sums = checked_vector(op + ": totals", totals, kDLFloat, 64);
  const int64_t groups = sums.count;
  const int64_t all = view(membership, [&] { return op + ": membership"; }).count;
  const int64_t tensors = groups == 0 ? 0 : all / groups;
  const View members = checked(op + ": membership", membership, kDLFloat, 64, {groups, tensors});
  const View rows = checked(op + ": moments", moments, kDLFloat, 64, {2, tensors, 3});
  const View flag = checked_one(op + ": finite", finite, kDLBool, 8);
  for (const View* each : {&members, &sums, &flag}) {
    require_device(*each, op + ": every tensor", rows, "the moments");
  }
  Speeds args{static_cast<const double*>(rows.data()),
              static_cast<const double*>(members.data()),
              static_cast<double*>(sums.data()),
              groups,
              tensors,
              nullptr,
              static_cast<bool*>(flag.data())};
  if (!active.is_none()) {
    const View gate = checked_one(op + ": active", active, kDLBool, 8);
    require_device(gate, op + ": active", rows, "the moments");
    args.active = static_cast<const bool*>(gate.data());
  }
  on_device_of(rows, 1, py::none(), [&](const auto& device) { accumulate_speeds(args, device); });
}

}  // namespace

void bind_speeds(py::module_& m) {
  using namespace pybind11::literals;
  m.def("accumulate_speeds_", &accumulate_speeds_, "moments"_a, "membership"_a, "totals"_a,
        "active"_a, "finite"_a);
}

}  // namespace mmbal
