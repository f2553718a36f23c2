// How a thread rounds, and what it does with subnormal numbers. Torch can switch these off for some
// threads (torch.set_flush_denormal); results must not depend on which thread computes them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mmbal {
namespace {

// IEEE's: to nearest, with subnormals, while it lives.
class FloatingMode {
 public:
  FloatingMode() : before_(get()) {
    if (before_ != kIeee) set(kIeee);
  }
  FloatingMode(const FloatingMode&) = delete;
  FloatingMode& operator=(const FloatingMode&) = delete;
  ~FloatingMode() {
    if (before_ != kIeee) set(before_);
  }

 private:
#if defined(__x86_64__)
  using Word = unsigned;
  static constexpr Word kMode = 0xe040;  // flush to zero, rounding, subnormals are zero
  static Word get() { return _mm_getcsr() & kMode; }
  static void set(Word mode) { _mm_setcsr((_mm_getcsr() & ~kMode) | mode); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kMode = 0x7c80000;  // flush to zero, rounding, NaN, forms of float16
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static Word get() { return read() & kMode; }
  static void set(Word mode) { asm volatile("msr fpcr, %0" : : "r"((read() & ~kMode) | mode)); }
#else
  using Word = int;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  static constexpr Word kIeee = 0;

  const Word before_;
};

}  // namespace
}  // namespace mmbal
