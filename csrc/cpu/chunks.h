// A list of gradients as chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "operations/gradients.h"

namespace mmbal {
namespace {

struct Chunk {
  int32_t gradient;
  int64_t index;
};

constexpr int64_t kGrain = 8;  // chunks a thread takes at a time

// The chunks of gradients [0, count) in order; returns how many elements they hold.
inline int64_t list_chunks(const Gradient* gradients, int64_t count, std::vector<Chunk>& chunks) {
  chunks.clear();
  int64_t elements = 0;
  for (int64_t g = 0; g < count; ++g) {
    elements += gradients[g].count;
    for (int64_t c = 0; c * kChunk < gradients[g].count; ++c) {
      chunks.push_back({static_cast<int32_t>(g), c});
    }
  }
  return elements;
}

struct Span {
  char* data;
  int64_t count;
  int64_t index;  // of the first element in its tensor
};

inline Span span(const Gradient& gradient, const Chunk& chunk) {
  const int64_t first = chunk.index * kChunk;
  return {static_cast<char*>(gradient.data) + first * size_of(gradient.dtype),
          std::min(kChunk, gradient.count - first), first};
}

// What another list has at the place of a chunk.
inline const char* beside(const void* const* list, const Gradient& gradient, const Chunk& chunk) {
  return static_cast<const char*>(list[chunk.gradient]) +
         chunk.index * kChunk * size_of(gradient.dtype);
}

}  // namespace
}  // namespace mmbal
