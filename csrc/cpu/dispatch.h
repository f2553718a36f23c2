// Kernels, compiled once per instruction set (csrc/cpu/kernels) and chosen at run time. A family of
// them is a struct of function pointers.
#pragma once

#include <string>
#include <vector>

namespace mmbal {

enum class Isa { baseline, avx2, avx512, neon };

// Names that MMBAL_CPU_ISA accepts here, slowest first.
std::vector<std::string> supported_isas();

// The best that this processor runs, or the one that MMBAL_CPU_ISA names.
// Throws std::runtime_error when that one is unknown or not supported here.
Isa chosen_isa();
std::string name_of(Isa isa);

// A family's table, one specialisation for each instruction set.
template <class Kernels, Isa isa>
const Kernels& kernels_for();

// That of the chosen instruction set.
template <class Kernels>
const Kernels& kernels() {
  switch (chosen_isa()) {
#if defined(MMBAL_HAVE_AVX2)
    case Isa::avx2:
      return kernels_for<Kernels, Isa::avx2>();
#endif
#if defined(MMBAL_HAVE_AVX512)
    case Isa::avx512:
      return kernels_for<Kernels, Isa::avx512>();
#endif
#if defined(MMBAL_HAVE_NEON)
    case Isa::neon:
      return kernels_for<Kernels, Isa::neon>();
#endif
    default:
      return kernels_for<Kernels, Isa::baseline>();
  }
}

}  // namespace mmbal
