// What kernels share: 16 bytes of a tensor as numbers, how a chunk divides into them, sums over a
// block, and who is last.
#pragma once

#include "cuda/launch.h"
#include "math/convert.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMBAL_PRAGMA(text) _Pragma(#text)
#define MMBAL_UNROLL_BY(times) MMBAL_PRAGMA(unroll times)
#else
#define MMBAL_UNROLL_BY(times)
#endif

namespace mmbal::cuda {
namespace {

// ------------------------------------------------------------------------------------ elements

// A type of tensors: what it is computed in, and its numbers in a packet, the 16 bytes that one
// instruction moves.
template <class T>
struct Element;

// What becomes of a result whose element was finite before: only float16 is too narrow.
struct WideElement {
  template <class Values>
  static __device__ __forceinline__ Values saturate(const Values&, const Values& after) {
    return after;
  }
};

template <>
struct Element<float> : WideElement {
  using Compute = float;
  static constexpr int kPacket = 4;
  static __device__ __forceinline__ float from(float x) { return x; }
  static __device__ __forceinline__ float to(float x) { return x; }
  static __device__ __forceinline__ void unpack(const uint4& packet, float* x) {
    x[0] = Scalar::from_bits(packet.x);
    x[1] = Scalar::from_bits(packet.y);
    x[2] = Scalar::from_bits(packet.z);
    x[3] = Scalar::from_bits(packet.w);
  }
  static __device__ __forceinline__ uint4 pack(const float* x) {
    return make_uint4(Scalar::bits(x[0]), Scalar::bits(x[1]), Scalar::bits(x[2]),
                      Scalar::bits(x[3]));
  }
};

template <>
struct Element<double> : WideElement {
  using Compute = double;
  static constexpr int kPacket = 2;
  static __device__ __forceinline__ double from(double x) { return x; }
  static __device__ __forceinline__ double to(double x) { return x; }
  static __device__ __forceinline__ double join(unsigned low, unsigned high) {
    const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
    return __longlong_as_double(static_cast<long long>(bits));
  }
  static __device__ __forceinline__ void unpack(const uint4& packet, double* x) {
    x[0] = join(packet.x, packet.y);
    x[1] = join(packet.z, packet.w);
  }
  static __device__ __forceinline__ uint4 pack(const double* x) {
    const auto a = static_cast<uint64_t>(__double_as_longlong(x[0]));
    const auto b = static_cast<uint64_t>(__double_as_longlong(x[1]));
    return make_uint4(static_cast<unsigned>(a), static_cast<unsigned>(a >> 32),
                      static_cast<unsigned>(b), static_cast<unsigned>(b >> 32));
  }
};

// Two 16-bit numbers in a word. The hardware converts in one instruction what convert.h spells out.
template <class T>
struct Pair;

template <>
struct Pair<Half> {
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
#if defined(__CUDA_ARCH__)
    const __half2_raw raw{static_cast<unsigned short>(word),
                          static_cast<unsigned short>(word >> 16)};
    const float2 pair = __half22float2(__half2(raw));
    x[0] = pair.x;
    x[1] = pair.y;
#else
    x[0] = to_float(Half{static_cast<uint16_t>(word)});
    x[1] = to_float(Half{static_cast<uint16_t>(word >> 16)});
#endif
  }
  static __device__ __forceinline__ unsigned pack(const float* x) {
#if defined(__CUDA_ARCH__)
    const __half2_raw raw(__floats2half2_rn(x[0], x[1]));
    return raw.x | static_cast<unsigned>(raw.y) << 16;
#else
    return to_half(x[0]).bits | static_cast<unsigned>(to_half(x[1]).bits) << 16;
#endif
  }
};

template <>
struct Pair<BFloat16> {
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = Scalar::from_bits(word << 16);
    x[1] = Scalar::from_bits(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) {
#if defined(__CUDA_ARCH__)
    const __nv_bfloat162_raw raw(__floats2bfloat162_rn(x[0], x[1]));
    return raw.x | static_cast<unsigned>(raw.y) << 16;
#else
    return to_bfloat16(x[0]).bits | static_cast<unsigned>(to_bfloat16(x[1]).bits) << 16;
#endif
  }
};

template <class T>
struct NarrowElement {
  using Compute = float;
  static constexpr int kPacket = 8;
  static __device__ __forceinline__ float from(T x) { return to_float(x); }
  static __device__ __forceinline__ void unpack(const uint4& packet, float* x) {
    Pair<T>::unpack(packet.x, x);
    Pair<T>::unpack(packet.y, x + 2);
    Pair<T>::unpack(packet.z, x + 4);
    Pair<T>::unpack(packet.w, x + 6);
  }
  static __device__ __forceinline__ uint4 pack(const float* x) {
    return make_uint4(Pair<T>::pack(x), Pair<T>::pack(x + 2), Pair<T>::pack(x + 4),
                      Pair<T>::pack(x + 6));
  }
};

template <>
struct Element<Half> : NarrowElement<Half> {
  static __device__ __forceinline__ Half to(float x) { return to_half(x); }
  static __device__ __forceinline__ uint4 saturate(const uint4& before, const uint4& after) {
    return make_uint4(saturate_halves(before.x, after.x), saturate_halves(before.y, after.y),
                      saturate_halves(before.z, after.z), saturate_halves(before.w, after.w));
  }
  static __device__ __forceinline__ Half saturate(Half before, Half after) {
    return {static_cast<uint16_t>(saturate_halves(before.bits, after.bits))};
  }
};
template <>
struct Element<BFloat16> : NarrowElement<BFloat16>, WideElement {
  static __device__ __forceinline__ BFloat16 to(float x) { return to_bfloat16(x); }
};

// A packet with x <- f(i, x) for element i, rounded to its type.
template <class T, class F>
__device__ __forceinline__ uint4 transformed(const uint4& packet, F&& f) {
  typename Element<T>::Compute x[Element<T>::kPacket];
  Element<T>::unpack(packet, x);
  MMBAL_UNROLL
  for (int i = 0; i < Element<T>::kPacket; ++i) x[i] = f(i, x[i]);
  return Element<T>::saturate(packet, Element<T>::pack(x));
}

// Elements as they would be had they been multiplied by *inverse_scale in memory.
template <class T, bool kUnscales>
class Unscaling {
 public:
  static constexpr bool kActive = kUnscales;
  using Compute = typename Element<T>::Compute;

  __device__ __forceinline__ explicit Unscaling(const float* inverse_scale)
      : inverse_(kUnscales ? *inverse_scale : 1.0f) {}

  __device__ __forceinline__ T operator()(T element) {
    if (!kUnscales) return element;
    return Element<T>::saturate(element, Element<T>::to(scaled(Element<T>::from(element))));
  }
  __device__ __forceinline__ uint4 operator()(const uint4& packet) {
    if (!kUnscales) return packet;
    return transformed<T>(packet, [&](int, Compute x) { return scaled(x); });
  }
  // Whether elements differ from memory.
  __device__ __forceinline__ bool changes() const { return kUnscales && inverse_ != 1; }
  // Whether one of them was NaN or Inf in memory.
  __device__ __forceinline__ bool found_inf() const { return kUnscales && finite_ != 0; }

 private:
  __device__ __forceinline__ Compute scaled(Compute x) {
    finite_ += static_cast<float>(x * 0);
    return x * static_cast<Compute>(inverse_);
  }

  // Half the registers that doubles would take.
  float inverse_;
  float finite_ = 0;  // becomes NaN where an element is NaN or Inf
};

// Calls f(T{}) with the type that `dtype` stands for.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

// -------------------------------------------------------------------------------------- chunks

// Some elements of one tensor: those that a block works on.
template <class T>
struct Span {
  T* data;
  int count;       // 0 < count <= kChunk
  uint64_t index;  // of the first one for the noise
};

// Tensor of a chunk: the last that begins at or before it.
template <int kCapacity>
__device__ __forceinline__ int tensor_of_chunk(const Tensors<kCapacity>& tensors, int chunk) {
  int low = 0;
  int high = tensors.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.begin[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
__device__ __forceinline__ Span<T> span_of_chunk(void* data, int64_t count, int64_t offset,
                                                 int64_t chunk) {
  const int64_t first = chunk * kChunk;
  const int64_t rest = count - first;
  return {static_cast<T*>(data) + first, static_cast<int>(rest < kChunk ? rest : kChunk),
          static_cast<uint64_t>(offset + first)};
}

// A span as `head` elements, `groups` groups of kGroup elements that start at a 16-byte boundary,
// and `tail` elements. One thread takes one element of head and tail, if any.
template <int kGroup>
struct Pieces {
  int head, groups, tail;

  template <class T>
  __device__ __forceinline__ explicit Pieces(const Span<T>& span) {
    const auto address = reinterpret_cast<uintptr_t>(span.data);
    head = static_cast<int>((0 - address) % 16 / sizeof(T));
    // Of two boundaries in a block of noise the one where the block begins, if it does.
    if (sizeof(T) == 8 && kGroup == 4) {
      head += static_cast<int>((span.index + static_cast<uint64_t>(head)) & 2);
    }
    if (head > span.count) head = span.count;
    groups = (span.count - head) / kGroup;
    tail = (span.count - head) % kGroup;
  }
  __device__ __forceinline__ bool single(int thread) const { return thread < head + tail; }
  // Position of a thread's single element, and of the first one of a group.
  __device__ __forceinline__ int single_at(int thread) const {
    return thread < head ? thread : thread + groups * kGroup;
  }
  __device__ __forceinline__ int group_at(int group) const { return head + group * kGroup; }
};

// ---------------------------------------------------------------------------------------- sums

// Sum over the lanes of a warp, in an order that is the same for all of them.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  MMBAL_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Sum over the block for all of its threads; `shared` has room for kWarps.
template <class A>
__device__ __forceinline__ A block_sum(A x, A* shared) {
  x = warp_sum(x);
  __syncthreads();  // `shared` may still be read from the sum before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = shared[0];
  MMBAL_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

// Orders memory accesses before it with those after it, as all threads of the device see them.
__device__ __forceinline__ void fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");  // __threadfence() is sequentially consistent
#else
  __threadfence();
#endif
}

// How many threads came here before.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  fence();
  return atomicAdd(counter, 1u);
}

// Whether the calling thread is the last of `count` that come here; what the others wrote before
// is then visible.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t count) {
  if (arrive(counter) != count - 1) return false;
  fence();
  return true;
}

// The same, and leaves the counter at zero.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t count) {
  if (!arrives_last(counter, count)) return false;
  *counter = 0;
  return true;
}

// Waits until a counter is beyond a value; what was written before it came there is then visible.
__device__ __forceinline__ void wait_until_above(const uint32_t* counter, uint32_t value) {
  for (;;) {
    uint32_t now;
#if defined(__CUDA_ARCH__)
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
#else
    now = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#endif
    if (now > value) return;
    __nanosleep(64);
  }
}

}  // namespace
}  // namespace mmbal::cuda
