// Gradients changed by what other tensors hold at the same places.
#pragma once

#include "cpu/update.h"

namespace mmbal {
namespace {

// The first `count` elements in a vector, the rest zeros.
template <class T>
MMBAL_HD FloatVector load_some(const T* x, int64_t count) {
  T padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = i < count ? x[i] : splat_as<T>(0.0f);
  return load(padded);
}

// What formulas are computed in for elements of type T.
template <class T>
using PolicyOf = std::conditional_t<std::is_same_v<T, double>, WideScalar, Simd>;

template <class T>
MMBAL_HD typename PolicyOf<T>::F operand(double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return Simd::splat(static_cast<float>(x));
  }
}

// x[i] <- f(x[i], others[i] ...) in the type of operands.
template <class T, class F, class... Others>
void combine(T* x, int64_t count, F&& f, const Others*... others) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < count; ++i) x[i] = f(x[i], others[i]...);
  } else {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const FloatVector g = load(x + i);
      store(x + i, Update<T>::saturate(f(g, load(others + i)...), g));
    }
    transform_tail(x + i, count - i, [&](FloatVector g) {
      return Update<T>::saturate(f(g, load_some(others + i, count - i)...), g);
    });
  }
}

}  // namespace
}  // namespace mmbal
