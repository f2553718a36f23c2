#include "operations/speeds.h"

#include <vector>

#include "device.h"
#include "math/speed.h"

namespace mmbal {

template <>
void accumulate_speeds(const Speeds& args, const Cpu&) {
  std::vector<double> ratios(static_cast<size_t>(args.groups));
  bool finite = true;
  for (int64_t g = 0; g < args.groups; ++g) {
    const double* members = args.membership + g * args.tensors;
    const double weights = group_norm(args.moments, members, args.tensors, 0, 1);
    const double gradients =
        group_norm(args.moments + 3 * args.tensors, members, args.tensors, 0, 1);
    ratios[g] = gradients / weights;
    finite &= is_finite(ratios[g]);
  }
  *args.finite = finite;
  if (!finite || (args.active && !*args.active)) return;
  for (int64_t g = 0; g < args.groups; ++g) args.totals[g] += ratios[g];
}

}  // namespace mmbal
