// A chunk of a gradient changed by what other tensors hold at the same places.
#pragma once

#include <type_traits>

#include "cuda/lists.h"

namespace mmbal::cuda {
namespace {

// What formulas are computed in for elements of type T.
template <class T>
using PolicyOf = std::conditional_t<std::is_same_v<T, double>, WideScalar, Scalar>;

// x[i] <- f(x[i], others[i] ...), by a block; then seen(x[i]) of what was written.
template <class T, class F, class Seen, class... Others>
__device__ __forceinline__ void combine(const Span<T>& x, F&& f, Seen&& seen,
                                        const Others*... others) {
  const auto change = [&](T* at, const auto&... numbers) {
    const uint4 before = *reinterpret_cast<const uint4*>(at);
    Numbers<T> mine(before);
    MMBAL_UNROLL
    for (int i = 0; i < Element<T>::kPacket; ++i) mine.x[i] = f(mine.x[i], numbers.x[i]...);
    const uint4 after = Element<T>::saturate(before, Element<T>::pack(mine.x));
    *reinterpret_cast<uint4*>(at) = after;
    const Numbers<T> written(after);
    MMBAL_UNROLL
    for (int i = 0; i < Element<T>::kPacket; ++i) seen(written.x[i]);
  };
  walk(
      x, [&](T* at, const auto&... packets) { change(at, Numbers<T>(packets)...); },
      [&](int at) {
        const T before = x.data[at];
        const auto y = f(Element<T>::from(before), Element<T>::from(others[at])...);
        const T after = Element<T>::saturate(before, Element<T>::to(y));
        x.data[at] = after;
        seen(Element<T>::from(after));
      },
      others...);
}

}  // namespace
}  // namespace mmbal::cuda
