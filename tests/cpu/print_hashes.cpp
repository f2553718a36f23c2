// Prints a hash of what each kernel of one instruction set computes, for test_neon.py to compare.
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels/gradients.h"

namespace mmbal {
template <>
const GradientKernels& kernels_for<GradientKernels, Isa::MMBAL_ISA>();
}

namespace {

uint64_t hash(const void* data, size_t bytes) {
  uint64_t value = 14695981039346656037u;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) {
    value = (value ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  return value;
}

}  // namespace

int main() {
  using namespace mmbal;
  const auto& table = kernels_for<GradientKernels, Isa::MMBAL_ISA>();
  const NoiseKey key{0x123456789abcdef0u, 7, 0x80000001u};
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    for (int64_t count : {1, 5, 63, 257, 4096}) {
      for (uint64_t index : {UINT64_C(0), UINT64_C(3), (UINT64_C(1) << 34) - 11}) {
        const auto bytes = static_cast<size_t>(count * size_of(static_cast<DType>(dtype)));
        std::vector<char> memory(bytes);
        table.noise[dtype](memory.data(), count, key, index);
        const uint64_t noise = hash(memory.data(), bytes);
        const Partial moments = table.moments[dtype](memory.data(), count);
        table.scale_and_add_noise[dtype](memory.data(), count, 0.3, 0.7, key, index + 1);
        const uint64_t updated = hash(memory.data(), bytes);
        table.scale[dtype](memory.data(), count, 1.7);
        std::printf("%d %" PRId64 " %" PRIu64 ": %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 "\n",
                    dtype, count, index, noise, hash(&moments, sizeof moments), updated,
                    hash(memory.data(), bytes));
      }
    }
  }
}
