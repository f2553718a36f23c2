#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace mmbal {

extern const KernelTable kernels_baseline;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_neon;

namespace {

std::vector<const KernelTable*> supported() {
  std::vector<const KernelTable*> tables{&kernels_baseline};
#if defined(MMBAL_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kernels_avx2);
  }
#endif
#if defined(MMBAL_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kernels_avx512);
  }
#endif
#if defined(MMBAL_HAVE_NEON)
  tables.push_back(&kernels_neon);
#endif
  return tables;
}

const KernelTable& choose() {
  const auto tables = supported();
  const char* wanted = std::getenv("MMBAL_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string known;
  for (const KernelTable* table : tables) {
    if (table->name == std::string(wanted)) return *table;
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("MMBAL_CPU_ISA: must be one of " + known + " on this processor (got '" +
                           wanted + "')");
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported()) names.emplace_back(table->name);
  return names;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace mmbal
