#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace mmbal {
namespace {

std::vector<Isa> supported() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(MMBAL_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::avx2);
#endif
#if defined(MMBAL_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::avx512);
  }
#endif
#if defined(MMBAL_HAVE_NEON)
  isas.push_back(Isa::neon);
#endif
  return isas;
}

Isa choose() {
  const auto isas = supported();
  const char* wanted = std::getenv("MMBAL_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string known;
  for (const Isa isa : isas) {
    if (name_of(isa) == wanted) return isa;
    known += (known.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::runtime_error("MMBAL_CPU_ISA: must be one of " + known + " on this processor (got '" +
                           wanted + "')");
}

}  // namespace

std::string name_of(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "neon"};
  return kNames[static_cast<int>(isa)];
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa isa : supported()) names.push_back(name_of(isa));
  return names;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace mmbal
