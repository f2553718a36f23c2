// Which instruction sets this build and this processor have.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mmbal {

// Names that MMBAL_CPU_ISA accepts here, slowest first.
std::vector<std::string> supported_isas();

}  // namespace mmbal
