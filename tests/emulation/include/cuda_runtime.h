// Stand-in for <cuda_runtime.h>: the project's .cu files, compiled by a host compiler, run on CPU
// memory.
//
//     g++ -std=c++17 -ffp-contract=off -I tests/emulation/include -x c++ kernels.cu
//         -x none tests/emulation/emulation.cpp -pthread
//
// Threads of a block are fibers of one OS thread; MMBAL_EMULATION_BLOCKS blocks (default 1) are in
// flight at a time, each on an OS thread of its own, and are claimed in order of blockIdx. One of
// them runs at a time; it hands its turn on where its threads spin, and now and then at a barrier.
// MMBAL_EMULATION_SEED=n (n > 0) runs blocks, warps and lanes in another order, fixed by n: a
// missing barrier or a dependence on the order of blocks then shows as a wrong result.
//
// It proves logic, memory safety (with -fsanitize=address,undefined; `__shared__` then gets
// redzones and blocks run on one OS thread) and that every barrier is reached by all. Kernels built
// with -fsanitize=thread, and this with MMBAL_EMULATION_TSAN, show races: every thread of a block
// is a thread to the sanitizer, and only barriers, __syncwarp, atomics and the launch order memory.
// Fences are not missed there, because atomics order memory as on the host. Neither the speed nor
// the rounding of hardware is proved.
//
// Stricter than the hardware, where CUDA leaves the case undefined:
//   - threads that wait at different __syncthreads() never meet;
//   - a value taken from a lane outside the mask has all bits set;
//   - new device memory and dynamic shared memory have all bits set.
//
// Two duties of a kernel: a loop that waits calls __nanosleep in its body, and `__grid_constant__`
// stands behind the type (`const Params __grid_constant__ params`): here it is the reference that
// makes all threads read one object.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define MMBAL_CUDA_EMULATED 1
#define CUDART_VERSION 13000

#if defined(MMBAL_EMULATION_ASAN)  // named for the scheduler, which is not looked at itself
#elif defined(__SANITIZE_ADDRESS__)
#define MMBAL_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MMBAL_EMULATION_ASAN 1
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__ &
#define __launch_bounds__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__  // nothing: library headers write __attribute__((__noinline__))
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef MMBAL_EMULATION_ASAN
#define __shared__ \
  static  // AddressSanitizer puts redzones around statics, not around thread_locals
#else
#define __shared__ static thread_local
#endif

// ---- vector types, with the alignment that CUDA gives them
// --------------------------------------------------

#define MMBAL_VECTOR2(name, type)         \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }

#define MMBAL_VECTOR4(name, type)                                      \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name { \
    type x, y, z, w;                                                   \
  };                                                                   \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

MMBAL_VECTOR2(ushort2, unsigned short)
MMBAL_VECTOR2(int2, int)
MMBAL_VECTOR2(uint2, unsigned)
MMBAL_VECTOR2(float2, float)
MMBAL_VECTOR2(longlong2, long long)
MMBAL_VECTOR2(ulonglong2, unsigned long long)
MMBAL_VECTOR2(double2, double)
MMBAL_VECTOR4(uchar4, unsigned char)
MMBAL_VECTOR4(ushort4, unsigned short)
MMBAL_VECTOR4(int4, int)
MMBAL_VECTOR4(uint4, unsigned)
MMBAL_VECTOR4(float4, float)
#undef MMBAL_VECTOR2
#undef MMBAL_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// ---- what a thread knows about itself
// -----------------------------------------------------------------------

// Of the one thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// ---- barriers and warp collectives
// --------------------------------------------------------------------------

namespace emulation {

// Where a thread waits, for the report of a deadlock.
struct Location {
  const char* file;
  const char* function;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(),
                                 const char* function = __builtin_FUNCTION(),
                                 int line = __builtin_LINE()) {
    return {file, function, line};
  }
};

// Both suspend the calling fiber; `operation` is the name of the intrinsic, a string literal.
int block_barrier(const char* operation, bool predicate,
                  Location at);  // number of threads whose predicate holds
uint64_t warp_collective(const char* operation, unsigned mask, uint64_t value, int source_lane,
                         Location at);
void yield();
int lane();

// Start of the launch's dynamic shared memory (config.dynamicSmemBytes; 16-byte aligned).
void* dynamic_shared();

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source_lane, Location at) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "no such shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(operation, mask, bits, source_lane, at);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

#define MMBAL_HERE emulation::Location at = emulation::Location::here()

inline void __syncthreads(MMBAL_HERE) { emulation::block_barrier("__syncthreads", false, at); }
inline int __syncthreads_count(int predicate, MMBAL_HERE) {
  return emulation::block_barrier("__syncthreads_count", predicate != 0, at);
}
inline int __syncthreads_or(int predicate, MMBAL_HERE) {
  return emulation::block_barrier("__syncthreads_or", predicate != 0, at) != 0;
}
inline int __syncthreads_and(int predicate, MMBAL_HERE) {
  return emulation::block_barrier("__syncthreads_and", predicate == 0, at) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, MMBAL_HERE) {
  emulation::warp_collective("__syncwarp", mask, 0, emulation::lane(), at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MMBAL_HERE) {
  return static_cast<unsigned>(
      emulation::warp_collective("__ballot_sync", mask, predicate != 0, -1, at));
}
inline int __any_sync(unsigned mask, int predicate, MMBAL_HERE) {
  return emulation::warp_collective("__any_sync", mask, predicate != 0, -1, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MMBAL_HERE) {
  return emulation::warp_collective("__all_sync", mask, predicate == 0, -1, at) == 0;
}
// No other lane need be converged: the smallest answer that CUDA allows.
inline unsigned __activemask() { return 1u << emulation::lane(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, MMBAL_HERE) {
  const int lane = emulation::lane(), first = lane & ~(width - 1);
  return emulation::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MMBAL_HERE) {
  const unsigned lane = static_cast<unsigned>(emulation::lane()),
                 room = lane & static_cast<unsigned>(width - 1);
  return emulation::shuffle("__shfl_up_sync", mask, value,
                            static_cast<int>(delta > room ? lane : lane - delta), at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MMBAL_HERE) {
  const unsigned lane = static_cast<unsigned>(emulation::lane()),
                 room = ~lane & static_cast<unsigned>(width - 1);
  return emulation::shuffle("__shfl_down_sync", mask, value,
                            static_cast<int>(delta > room ? lane : lane + delta), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, MMBAL_HERE) {
  const int lane = emulation::lane(), source = lane ^ lane_mask;
  const bool inside = source >= 0 && source <= (lane | (width - 1));
  return emulation::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, at);
}
#undef MMBAL_HERE

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// ---- atomics: the types that CUDA has, no more
// ---------------------------------------------------------------

namespace emulation {

template <class T>
struct Same {  // keeps a parameter out of deduction: atomicAdd(unsigned*, 1)
  using type = T;
};
template <class T, class... Types>
constexpr bool one_of = (std::is_same<T, Types>::value || ...);

template <class T, class F>
T atomic_update(T* address, F f) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (
      !__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulation

#define MMBAL_ATOMIC(name, expression, ...)                                               \
  template <class T>                                                                      \
  T name(T* address, typename emulation::Same<T>::type value) {                           \
    static_assert(emulation::one_of<T, __VA_ARGS__>, #name ": no such overload");         \
    return emulation::atomic_update(address, [value](T old) -> T { return expression; }); \
  }

MMBAL_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
MMBAL_ATOMIC(atomicSub, old - value, int, unsigned)
MMBAL_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, unsigned long long)
MMBAL_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
MMBAL_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
MMBAL_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
MMBAL_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
MMBAL_ATOMIC(atomicExch, (void(old), value), int, unsigned, unsigned long long, float)
MMBAL_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
MMBAL_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1, unsigned)
#undef MMBAL_ATOMIC

template <class T>
T atomicCAS(T* address, typename emulation::Same<T>::type expected,
            typename emulation::Same<T>::type value) {
  static_assert(emulation::one_of<T, int, unsigned, unsigned long long, unsigned short>,
                "atomicCAS: no such overload");
  __atomic_compare_exchange(address, &expected, &value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

// ---- loads and stores with a cache hint
// ----------------------------------------------------------------------

#define MMBAL_LOAD(name)     \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
#define MMBAL_STORE(name)                                          \
  template <class T>                                               \
  void name(T* address, typename emulation::Same<T>::type value) { \
    *address = value;                                              \
  }
MMBAL_LOAD(__ldg)
MMBAL_LOAD(__ldca)
MMBAL_LOAD(__ldcg)
MMBAL_LOAD(__ldcs)
MMBAL_LOAD(__ldlu)
MMBAL_STORE(__stcg)
MMBAL_STORE(__stcs)
MMBAL_STORE(__stwb)
MMBAL_STORE(__stwt)
#undef MMBAL_LOAD
#undef MMBAL_STORE

template <class T>
T __ldcv(const T* address) {
  __asm__ volatile("" ::: "memory");  // read again, every time
  return *address;
}

// ---- arithmetic
// ----------------------------------------------------------------------------------------------

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>((Wide{a} * b) >> 64);
}
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) {
  return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a));
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }

inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }

#define MMBAL_BITS(name, from, to)                          \
  inline to name(from value) {                              \
    static_assert(sizeof(from) == sizeof(to), "same size"); \
    to bits;                                                \
    std::memcpy(&bits, &value, sizeof bits);                \
    return bits;                                            \
  }
MMBAL_BITS(__float_as_uint, float, unsigned)
MMBAL_BITS(__float_as_int, float, int)
MMBAL_BITS(__uint_as_float, unsigned, float)
MMBAL_BITS(__int_as_float, int, float)
MMBAL_BITS(__double_as_longlong, double, long long)
MMBAL_BITS(__longlong_as_double, long long, double)
#undef MMBAL_BITS

#define MMBAL_MIN_MAX(type)                                 \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
MMBAL_MIN_MAX(int)
MMBAL_MIN_MAX(unsigned)
MMBAL_MIN_MAX(long)
MMBAL_MIN_MAX(unsigned long)
MMBAL_MIN_MAX(long long)
MMBAL_MIN_MAX(unsigned long long)
#undef MMBAL_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- host API: every call is synchronous
// ---------------------------------------------------------------------

// X(name, number, text)
#define MMBAL_CUDA_ERRORS(X)                                                                    \
  X(cudaSuccess, 0, "no error")                                                                 \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                               \
  X(cudaErrorMemoryAllocation, 2, "out of memory")                                              \
  X(cudaErrorInitializationError, 3, "initialization error")                                    \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                         \
  X(cudaErrorInsufficientDriver, 35,                                                            \
    "CUDA driver version is insufficient for CUDA runtime version")                             \
  X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                              \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                               \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                      \
  X(cudaErrorNoKernelImageForDevice, 209,                                                       \
    "no kernel image is available for execution on the device")                                 \
  X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                             \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                   \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")              \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                  \
  X(cudaErrorNotSupported, 801, "operation not supported")                                      \
  X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
  X(cudaErrorStreamCaptureInvalidated, 901,                                                     \
    "operation failed due to a previous error during capture")                                  \
  X(cudaErrorUnknown, 999, "unknown error")

enum cudaError_t {
#define X(name, number, text) name = number,
  MMBAL_CUDA_ERRORS(X)
#undef X
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMemoryPoolsSupported = 115,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);

namespace emulation {

// What the host has asked of the device; for tests.
struct Counters {
  std::atomic<long> launches{0};
  std::atomic<long> synchronisations{
      0};  // calls that wait for the device, cudaMemcpy and cudaFree among them
  std::atomic<long> allocations{0};
  std::atomic<long> copies_to_host{0};  // cudaMemcpyDefault counts: the direction cannot be known
  void reset() { launches = synchronisations = allocations = copies_to_host = 0; }
};
Counters& counters();

cudaError_t allocate(void** pointer, size_t bytes);
cudaError_t occupancy(int* blocks, int block_size);
// `run` calls the kernel with its arguments.
cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes,
                   std::function<void()> run);

// Stream capture, for tests: launches and memsets between begin_capture() and end_capture() are
// kept with a copy of their arguments instead of run. Whatever else would queue work, wait or
// allocate fails with cudaErrorStreamCaptureUnsupported and spoils the capture. (CUDA can capture
// some copies; nothing here needs them.)
struct Graph {
  std::vector<std::function<cudaError_t()>> work;
  size_t launches = 0;

  // Runs what was kept, one after another, up to the first that fails.
  cudaError_t replay() const;
};
void begin_capture();
std::unique_ptr<Graph> end_capture();  // null where the capture was spoiled

template <class... T>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T)), ...);
  return bytes;
}

}  // namespace emulation

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return emulation::allocate(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t) {
  return emulation::allocate(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaFuncSetAttribute(T*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int block_size, size_t) {
  return emulation::occupancy(blocks, block_size);
}

template <class... ExpTypes, class... ActTypes>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(ExpTypes...),
                               ActTypes&&... args) {
  static_assert((std::is_trivially_copyable<std::decay_t<ExpTypes>>::value && ...),
                "parameters are copied as bytes");
  return emulation::launch(
      *config, emulation::parameter_bytes<std::decay_t<ExpTypes>...>(),
      [kernel, parameters = std::tuple<std::decay_t<ExpTypes>...>(
                   std::forward<ActTypes>(args)...)] { std::apply(kernel, parameters); });
}
