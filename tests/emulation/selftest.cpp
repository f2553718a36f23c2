// What the stand-in must do, one case per call: `selftest <case>`. The kernels are valid CUDA (nvcc
// compiles this file).
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace {

constexpr unsigned full = 0xffffffffu;

template <class... Exp, class... Act>
cudaError_t start(dim3 grid, dim3 block, void (*kernel)(Exp...), Act&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Act>(args)...);
}

// ---- block reduction, with and without shared memory written in time

template <bool with_barrier>
__global__ void __launch_bounds__(1024) block_sum(const float* __restrict__ in, float* out) {
  __shared__ float partial[1024];
  const unsigned t = threadIdx.x, n = blockDim.x;
  partial[t] = in[size_t{blockIdx.x} * n + t];
  for (unsigned half = n / 2; half > 0; half /= 2) {
    if (with_barrier) __syncthreads();
    if (t < half) partial[t] += partial[t + half];
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

std::vector<float> block_sums(void (*kernel)(const float*, float*), unsigned blocks,
                              unsigned threads) {
  std::vector<float> in(size_t{blocks} * threads), out(blocks, -1.0f);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 31);
  REQUIRE(start(blocks, threads, kernel, in.data(), out.data()) == cudaSuccess);
  for (unsigned b = 0; b < blocks; ++b)
    out[b] -= std::accumulate(in.begin() + b * threads, in.begin() + (b + 1) * threads, 0.0f);
  return out;
}

void reduction() {
  REQUIRE(block_sums(block_sum<true>, 16, 256) == std::vector<float>(16, 0.0f));
  REQUIRE(block_sums(block_sum<true>, 2, 1024) == std::vector<float>(2, 0.0f));
  REQUIRE(block_sums(block_sum<true>, 3, 1) == std::vector<float>(3, 0.0f));
}

void missing_barrier() { REQUIRE(block_sums(block_sum<false>, 1, 256)[0] != 0.0f); }

// Wrong, and right only as long as threads run in order.
__global__ void left_neighbour(int* out) {
  __shared__ int values[256];
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  out[t] = values[t == 0 ? 0 : t - 1];
  __syncthreads();
  values[t] = -1;
}

void order_of_threads() {
  std::vector<int> out(512);
  REQUIRE(start(2, 256, left_neighbour, out.data()) == cudaSuccess);
  for (int t = 1; t < 256; ++t) REQUIRE(out[t] == t - 1);
}

// ---- warps

__global__ void shuffles(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int* o = out + t * 8;
  o[0] = __shfl_sync(full, t, 3);
  o[1] = __shfl_up_sync(full, t, 2, 8);
  o[2] = __shfl_down_sync(full, t, 2, 8);
  o[3] = __shfl_xor_sync(full, t, 5, 16);
  o[4] = static_cast<int>(__ballot_sync(full, t % 3 == 0));
  o[5] = __any_sync(full, lane == 7) + 2 * __all_sync(full, lane < 31);
  double sum = t;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(full, sum, step);
  o[6] = static_cast<int>(sum);
  // Each half of the warp on its own path, the halves never meet.
  if (lane < 16) {
    o[7] = __shfl_sync(0x0000ffffu, t, 15);
  } else {
    __syncwarp(0xffff0000u);
    o[7] = __shfl_sync(0xffff0000u, t, 16);
  }
}

void warps() {
  std::vector<int> out(96 * 8);
  REQUIRE(start(1, 96, shuffles, out.data()) == cudaSuccess);
  for (int t = 0; t < 96; ++t) {
    const int lane = t % 32, base = t - lane, *o = out.data() + t * 8;
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>((base + i) % 3 == 0) << i;
    REQUIRE(o[0] == base + 3);
    REQUIRE(o[1] == (lane % 8 < 2 ? t : t - 2));
    REQUIRE(o[2] == (lane % 8 > 5 ? t : t + 2));
    REQUIRE(o[3] == base + (lane ^ 5));
    REQUIRE(o[4] == static_cast<int>(ballot));
    REQUIRE(o[5] == 1);
    REQUIRE(o[6] == 32 * base + 496);
    REQUIRE(o[7] == base + (lane < 16 ? 15 : 16));
  }
}

// ---- barriers that also count; threads that left do not hold the others up

__global__ void votes(int* out) {
  const int t = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x);
  if (t >= 50) return;
  const int count = __syncthreads_count(t % 2);
  const int any = __syncthreads_or(t == 49), none = __syncthreads_or(t == 50);
  const int all = __syncthreads_and(t < 50), not_all = __syncthreads_and(t < 49);
  out[t] = count * 16 + any * 8 + !none * 4 + all * 2 + !not_all;
}

void early_exit() {
  std::vector<int> out(64);
  REQUIRE(start(1, dim3(8, 8), votes, out.data()) == cudaSuccess);
  for (int t = 0; t < 64; ++t) REQUIRE(out[t] == (t < 50 ? 25 * 16 + 15 : 0));
}

// ---- the last block to finish merges; a block waits for the one with the ticket before its own

__global__ void last_block(const float* in, float* partial, unsigned* done, float* total) {
  __shared__ bool last;
  float sum = in[blockIdx.x * 32 + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(full, sum, step);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float all = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) all += __ldcg(partial + b);
  *total = all;
}

void last_block_done() {
  std::vector<float> in(40 * 32), partial(40);
  std::iota(in.begin(), in.end(), 0.0f);
  unsigned done = 0;
  float total = 0;
  for (int i = 0; i < 2; ++i) {
    REQUIRE(start(40, 32, last_block, in.data(), partial.data(), &done, &total) == cudaSuccess);
    REQUIRE(total == 1280 * 1279 / 2.0f);
    REQUIRE(done == 0);
  }
}

__global__ void in_ticket_order(unsigned* ticket, unsigned* turn, unsigned* order, bool own) {
  __shared__ unsigned mine;
  if (threadIdx.x == 0) mine = own ? atomicAdd(ticket, 1) : blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 5)
    while (atomicAdd(turn, 0) != mine) __nanosleep(32);
  __syncthreads();
  if (threadIdx.x != 0) return;
  order[mine] = blockIdx.x;
  __threadfence();
  atomicExch(turn, mine + 1);
}

void tickets() {
  unsigned ticket = 0, turn = 0;
  std::vector<unsigned> order(200, ~0u), seen(200);
  REQUIRE(start(200, 64, in_ticket_order, &ticket, &turn, order.data(), true) == cudaSuccess);
  for (unsigned block : order) ++seen.at(block);
  REQUIRE(turn == 200);
  REQUIRE(seen == std::vector<unsigned>(200, 1));
}

// Waits for a turn that never comes.
void spin_forever() {
  unsigned ticket = 0, turn = 1000;
  std::vector<unsigned> order(8);
  REQUIRE(start(8, 64, in_ticket_order, &ticket, &turn, order.data(), true) ==
          cudaErrorLaunchFailure);
}

// Block 0 waits for block 1, and is still itself afterwards.
__global__ void wait_for_next(unsigned* turn, unsigned* after) {
  if (threadIdx.x != 0) return;
  const unsigned block = blockIdx.x;
  while (block == 0 && atomicAdd(turn, 0) == 0) __nanosleep(32);
  if (block == 1) atomicExch(turn, 1u);
  after[block] = blockIdx.x;
}

void blocks_in_flight() {
  unsigned turn = 0;
  const bool two = std::strcmp(std::getenv("MMBAL_EMULATION_BLOCKS"), "2") == 0;
  std::vector<unsigned> after(2, 2);
  REQUIRE(start(2, 64, wait_for_next, &turn, after.data()) ==
          (two ? cudaSuccess : cudaErrorLaunchFailure));
  REQUIRE(turn == (two ? 1u : 0u));
  if (two) REQUIRE(after == std::vector<unsigned>({0, 1}));
}

// ---- threads that wait for ever

__global__ void divergent(int how) {
  const unsigned t = threadIdx.x;
  if (how == 0) {
    if (t < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (how == 1) {
    if (t < 32)
      __shfl_sync(full, t, 0);
    else if (t < 40)
      __syncthreads();
    else
      __syncwarp(full);
  } else if (t < 16) {
    __syncwarp(full);
  } else {
    __syncwarp(0xffff8000u);
  }
}

void divergent_barrier(int how) {
  REQUIRE(start(3, 64, divergent, how) == cudaErrorLaunchFailure);
  REQUIRE(cudaGetLastError() == cudaErrorLaunchFailure);
  REQUIRE(cudaGetLastError() == cudaSuccess);
  reduction();  // and the next launch is none the worse
}

// ---- atomics, bits, parameters

struct Parameters {
  int values[8000];
  const void** seen;
};

__global__ void large_parameters(const Parameters __grid_constant__ parameters) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  parameters.seen[t] = parameters.values[t] == static_cast<int>(t) ? &parameters : nullptr;
}

__global__ void all_atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d) {
  const unsigned t = threadIdx.x;
  atomicAdd(i, 1);
  atomicMax(i + 1, static_cast<int>(t));
  atomicMin(i + 2, -static_cast<int>(t));
  atomicOr(u, 1u << t % 32);
  atomicInc(u + 1, 9);
  atomicExch(u + 2, 7u);
  if (atomicCAS(u + 3, 0u, t + 1) == 0) atomicAdd(u + 4, 1);
  atomicAdd(l, 1ull << 40);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
}

void atomics_and_parameters() {
  int i[3] = {};
  unsigned u[5] = {};
  unsigned long long l = 0;
  float f = 0;
  double d = 0;
  REQUIRE(start(1, 64, all_atomics, i, u, &l, &f, &d) == cudaSuccess);
  REQUIRE(i[0] == 64 && i[1] == 63 && i[2] == -63);
  REQUIRE(u[0] == full && u[1] == 4 && u[2] == 7 && u[3] != 0 && u[4] == 1);
  REQUIRE(l == 64ull << 40 && f == 32.0f && d == 16.0);

  std::vector<const void*> seen(512);
  Parameters parameters = {};
  std::iota(parameters.values, parameters.values + 8000, 0);
  parameters.seen = seen.data();
  REQUIRE(start(4, 128, large_parameters, parameters) == cudaSuccess);
  REQUIRE(seen[0] != nullptr && seen == std::vector<const void*>(512, seen[0]));
}

// ---- launches that must be refused, and the rest of the host API

struct TooMuch {
  char bytes[32768];
};

#ifdef MMBAL_CUDA_EMULATED
__global__ void too_many_parameters(const TooMuch __grid_constant__) {}
__global__ void dynamic(int* out) {
  int* shared = static_cast<int*>(emulation::dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}
#endif

void host() {
  float out = 0, *device = nullptr, in = 3;
  const auto kernel = block_sum<true>;
  REQUIRE(start(0, 32, kernel, &in, &out) == cudaErrorInvalidConfiguration);
  REQUIRE(start(1, 1025, kernel, &in, &out) == cudaErrorInvalidConfiguration);
  REQUIRE(start(1, dim3(1, 1, 65), kernel, &in, &out) == cudaErrorInvalidConfiguration);
  REQUIRE(start(dim3(1, 65536), 1, kernel, &in, &out) == cudaErrorInvalidConfiguration);
  REQUIRE(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  REQUIRE(cudaGetLastError() == cudaErrorInvalidConfiguration);
  REQUIRE(std::string(cudaGetErrorName(cudaErrorInvalidValue)) == "cudaErrorInvalidValue");
  int value = 0;
  REQUIRE(cudaGetDeviceCount(&value) == cudaSuccess && value == 1);
  REQUIRE(cudaSetDevice(1) == cudaErrorInvalidDevice);
  REQUIRE(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
          value == 9);
#ifdef MMBAL_CUDA_EMULATED
  REQUIRE(start(1, 1, too_many_parameters, TooMuch{}) == cudaErrorInvalidValue);
  std::vector<int> reversed(32);
  cudaLaunchConfig_t config = {};
  config.blockDim = 32;
  config.dynamicSmemBytes = 32 * sizeof(int);
  REQUIRE(cudaLaunchKernelEx(&config, dynamic, reversed.data()) == cudaSuccess);
  for (int i = 0; i < 32; ++i) REQUIRE(reversed[i] == 31 - i);

  emulation::counters().reset();
#endif
  REQUIRE(cudaMallocAsync(&device, 4, nullptr) == cudaSuccess);
  REQUIRE(device[0] != device[0]);
  REQUIRE(cudaMemcpyAsync(device, &in, 4, cudaMemcpyHostToDevice, nullptr) == cudaSuccess);
  REQUIRE(start(1, 1, kernel, device, device) == cudaSuccess);
  REQUIRE(cudaMemcpyAsync(&out, device, 4, cudaMemcpyDeviceToHost, nullptr) == cudaSuccess);
  REQUIRE(cudaStreamSynchronize(nullptr) == cudaSuccess);
  REQUIRE(cudaFreeAsync(device, nullptr) == cudaSuccess);
  REQUIRE(out == 3.0f);
#ifdef MMBAL_CUDA_EMULATED
  const emulation::Counters& counters = emulation::counters();
  REQUIRE(counters.launches == 1 && counters.synchronisations == 1);
  REQUIRE(counters.allocations == 1 && counters.copies_to_host == 1);
#endif
}

// ---- captured launches

struct Addition {
  int* sum;
  int by;
};

__global__ void add(const Addition __grid_constant__ addition) { *addition.sum += addition.by; }

#ifdef MMBAL_CUDA_EMULATED
void capture() {
  int sum = 0;
  Addition addition{&sum, 1};
  cudaStreamCaptureStatus status;
  emulation::begin_capture();
  REQUIRE(start(1, 1, add, addition) == cudaSuccess);
  addition.by = 10;
  REQUIRE(start(1, 1, add, addition) == cudaSuccess);
  REQUIRE(start(0, 1, add, addition) == cudaErrorInvalidConfiguration);
  addition.by = 100;
  REQUIRE(cudaStreamIsCapturing(nullptr, &status) == cudaSuccess);
  REQUIRE(status == cudaStreamCaptureStatusActive);
  const auto graph = emulation::end_capture();
  REQUIRE(sum == 0 && graph != nullptr && graph->launches == 2);
  for (int i = 1; i <= 3; ++i) {
    REQUIRE(graph->replay() == cudaSuccess);
    REQUIRE(sum == 11 * i);
  }

  emulation::begin_capture();
  REQUIRE(cudaMemsetAsync(&sum, 0, sizeof sum, nullptr) == cudaSuccess);
  REQUIRE(start(1, 1, add, addition) == cudaSuccess);
  const auto zeroing = emulation::end_capture();
  REQUIRE(sum == 33 && zeroing != nullptr && zeroing->launches == 1);
  for (int i = 0; i < 2; ++i) {
    REQUIRE(zeroing->replay() == cudaSuccess);
    REQUIRE(sum == 100);
  }
  sum = 33;

  int* memory = nullptr;
  const std::vector<std::function<cudaError_t()>> forbidden = {
      [&] { return cudaMalloc(&memory, 4); },
      [&] { return cudaMallocAsync(&memory, 4, nullptr); },
      [&] { return cudaFree(&sum); },
      [&] { return cudaFreeAsync(&sum, nullptr); },
      [&] { return cudaMemcpy(&sum, &addition.by, 4, cudaMemcpyDeviceToHost); },
      [&] { return cudaMemcpyAsync(&sum, &addition.by, 4, cudaMemcpyDeviceToHost, nullptr); },
      [&] { return cudaMemset(&sum, 0, 4); },
      [&] { return cudaDeviceSynchronize(); },
      [&] { return cudaStreamSynchronize(nullptr); },
  };
  for (const auto& call : forbidden) {
    emulation::begin_capture();
    REQUIRE(call() == cudaErrorStreamCaptureUnsupported);
    REQUIRE(start(1, 1, add, addition) == cudaErrorStreamCaptureInvalidated);
    REQUIRE(cudaStreamIsCapturing(nullptr, &status) == cudaSuccess);
    REQUIRE(status == cudaStreamCaptureStatusInvalidated);
    REQUIRE(emulation::end_capture() == nullptr);
  }
  REQUIRE(sum == 33);
  REQUIRE(start(1, 1, add, addition) == cudaSuccess);
  REQUIRE(sum == 133);
}
#endif

// ---- memory that threads share, for the race detector: right, or without what orders it

// Lanes of a warp pass values through memory.
template <bool with_syncwarp>
__global__ void pass_in_warp(int* out) {
  __shared__ int values[32];
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  if (with_syncwarp)
    __syncwarp();
  else
    __shfl_sync(full, t, 0);  // orders no memory
  out[t] = values[31 - t];
}

// A block reads what the one before it wrote.
template <bool with_wait>
__global__ void pass_to_next(unsigned* turn, unsigned* values) {
  __shared__ unsigned mine;
  if (threadIdx.x == 0) mine = atomicAdd(turn, 1);
  __syncthreads();
  if (threadIdx.x == 1 && mine > 0) {
    if (with_wait)
      while (atomicAdd(turn + mine, 0) == 0) __nanosleep(32);
    values[mine] += values[mine - 1];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  atomicExch(turn + mine + 1, 1u);
}

template <bool with_atomics>
__global__ void count(unsigned* out) {
  if (with_atomics)
    atomicAdd(out, 1);
  else
    ++*out;
}

void shared_memory(bool ordered) {
  std::vector<int> out(32);
  REQUIRE(start(1, 32, ordered ? pass_in_warp<true> : pass_in_warp<false>, out.data()) ==
          cudaSuccess);
}

void results_of_another_block(bool ordered) {
  std::vector<unsigned> turn(9), values(8, 1);
  REQUIRE(start(8, 32, ordered ? pass_to_next<true> : pass_to_next<false>, turn.data(),
                values.data()) == cudaSuccess);
  REQUIRE(!ordered || values[7] == 8);
}

void counter(bool ordered) {
  unsigned out = 0;
  for (int i = 1; i <= 2; ++i) {  // one launch comes after the other
    REQUIRE(start(2, 64, ordered ? count<true> : count<false>, &out) == cudaSuccess);
    REQUIRE(!ordered || out == 128u * static_cast<unsigned>(i));
    ++out, --out;
  }
}

// ---- memory errors, for the sanitizers to find

__global__ void writes(float* out, float* offset) {
  __shared__ float shared[32];
  offset[threadIdx.x] = 1.0f;
  __syncthreads();
  float* p = shared;
  p[threadIdx.x + static_cast<unsigned>(out[0])] = 2.0f;
}

void shared_overflow() {
  float distance = 4, data[32];
  start(1, 32, writes, &distance, data);
}

void global_overflow() {
  float distance = 0;
  std::vector<float> data(31);
  start(1, 32, writes, &distance, data.data());
}

__global__ void copies(const float* in, float4* out) {
  *out = *reinterpret_cast<const float4*>(in);
}

void misaligned() {
  alignas(16) float data[8] = {};
  float4 out;
  start(1, 1, copies, data + 1, &out);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> cases = {
      {"reduction", reduction},
      {"missing_barrier", missing_barrier},
      {"order_of_threads", order_of_threads},
      {"warps", warps},
      {"early_exit", early_exit},
      {"last_block_done", last_block_done},
      {"tickets", tickets},
      {"spin_forever", spin_forever},
      {"blocks_in_flight", blocks_in_flight},
      {"divergent_barrier_0", [] { divergent_barrier(0); }},
      {"divergent_barrier_1", [] { divergent_barrier(1); }},
      {"divergent_barrier_2", [] { divergent_barrier(2); }},
      {"atomics_and_parameters", atomics_and_parameters},
      {"host", host},
#ifdef MMBAL_CUDA_EMULATED
      {"capture", capture},
#endif
      {"shared_memory", [] { shared_memory(true); }},
      {"missing_syncwarp", [] { shared_memory(false); }},
      {"results_of_another_block", [] { results_of_another_block(true); }},
      {"missing_wait", [] { results_of_another_block(false); }},
      {"counter", [] { counter(true); }},
      {"missing_atomic", [] { counter(false); }},
      {"shared_overflow", shared_overflow},
      {"global_overflow", global_overflow},
      {"misaligned", misaligned},
  };
  const auto found = cases.find(argc == 2 ? argv[1] : "");
  if (found == cases.end()) {
    std::fprintf(stderr, "usage: selftest <case>\n");
    return 2;
  }
  found->second();
  std::puts("ok");
  return 0;
}
