// Dots of pairs of tensors.
#pragma once

#include "cuda/lists.h"
#include "math/dots.h"

namespace mmbal::cuda {
namespace {

// Of the whole tensor that a chunk belongs to; see sum_over_chunks.
template <int kCapacity>
__device__ __forceinline__ bool dots_of_tensor(const Lists<1, kCapacity>& lists, int chunk, int t,
                                               double* parts, uint32_t* counters, Dots& dots) {
  const Tensors<kCapacity>& first = lists.first;
  dots = {};
  with_type(static_cast<DType>(first.dtype[t]), [&](auto type) {
    using T = decltype(type);
    using Compute = typename Element<T>::Compute;
    each_element(
        span_of_chunk<T>(first.data[t], first.count[t], 0, chunk - first.begin[t]),
        [&](Compute x, Compute y) { add_products(x, y, &dots); },
        lists.template beside<T>(0, t, chunk));
  });
  double sums[] = {dots.first, dots.both, dots.second};
  if (!sum_over_chunks(first, chunk, t, parts, counters, sums)) return false;
  dots = {sums[0], sums[1], sums[2]};
  return true;
}

}  // namespace
}  // namespace mmbal::cuda
