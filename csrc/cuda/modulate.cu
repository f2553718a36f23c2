// The update g <- k g + N(0, std(g) + eps), in place, a block per chunk.
#include "cuda/noise.h"
#include "math/modulation.h"

namespace mmbal::cuda {
namespace {

struct Application {
  Tensors tensors;
  const float* coefficients;
  double noise;
  double eps;
  NoiseSource source;
  const double* moments;  // [rows, 3], read where noise is not 0
  int32_t* status;        // may be null
  int64_t* advance;       // may be null
  uint32_t* block_counter;
};

// What one element becomes: bit for bit what csrc/cpu computes.
template <class T>
struct Update {
  float k, amplitude;

  __device__ __forceinline__ Update(float coefficient, double scale)
      : k(coefficient), amplitude(static_cast<float>(scale)) {}
  __device__ __forceinline__ float operator()(float g, float z) const {
    return saturate(Scalar::fma(amplitude, z, k * g), g);
  }
  __device__ __forceinline__ float scaled(float g) const { return saturate(k * g, g); }

  // Finite gradients stay finite in float16.
  static __device__ __forceinline__ float saturate(float y, float g) {
    if (!std::is_same<T, Half>::value) return y;
    const float clamped = y > kHalfMax ? kHalfMax : y < -kHalfMax ? -kHalfMax : y;
    return g - g == 0.0f ? clamped : y;
  }
};

template <>
struct Update<double> {
  double k, amplitude;

  __device__ __forceinline__ Update(float coefficient, double scale)
      : k(coefficient), amplitude(scale) {}
  __device__ __forceinline__ double operator()(double g, float z) const {
    return k * g + amplitude * static_cast<double>(z);
  }
  __device__ __forceinline__ double scaled(double g) const { return k * g; }
};

// Calls f(j, position) for the j-th group of the calling thread.
template <class T, class F>
__device__ __forceinline__ void for_each_group(const Pieces<kGroup<T>>& pieces, F&& f) {
  MMBAL_UNROLL
  for (int j = 0; j < kGroups<T>; ++j) {
    const int group = static_cast<int>(threadIdx.x) + j * kThreads;
    if (group < pieces.groups) f(j, pieces.group_at(group));
  }
}

template <class T>
__device__ __forceinline__ void scale(const Span<T>& span, const Pieces<kGroup<T>>& pieces,
                                      const Update<T>& update, int32_t* status) {
  using Compute = typename Element<T>::Compute;
  Compute finite = 0;  // becomes NaN where an element is NaN or Inf
  const bool writes = update.k != 1;
  const auto scaled = [&](Compute g) {
    finite += g * 0;
    return update.scaled(g);
  };
  Group<T> groups[kGroups<T>];
  for_each_group<T>(pieces, [&](int j, int at) { groups[j].load(span.data + at); });
  for_each_group<T>(pieces, [&](int j, int at) {
    groups[j].transform([&](int, Compute g) { return scaled(g); });
    if (writes) groups[j].store(span.data + at);
  });
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces.single(thread)) {
    T& element = span.data[pieces.single_at(thread)];
    const Compute y = scaled(Element<T>::from(element));
    if (writes) element = Element<T>::to(y);
  }
  if (status && finite != 0) atomicOr(status, kNonFiniteGradient);
}

template <class T>
__device__ __forceinline__ void apply_noisy(const Span<T>& span, const Application& a, float k,
                                            const NoiseKey& key, const double* row) {
  using Compute = typename Element<T>::Compute;
  __shared__ double shared_amplitude;
  const Pieces<kGroup<T>> pieces(span);
  const double count = row[0];
  const double m2 = row[2];
  const bool in_step = ((span.index + pieces.head) & 3) == 0;  // blocks of noise and 16-byte ones
  Group<T> groups[kGroups<T>];
  if (in_step) for_each_group<T>(pieces, [&](int j, int at) { groups[j].load(span.data + at); });
  if (threadIdx.x == 0) {
    shared_amplitude = noise_amplitude(count, m2, a.noise, a.eps);
    if (a.status && !is_finite(m2)) atomicOr(a.status, kNonFiniteGradient);
  }
  __syncthreads();
  const double amplitude = shared_amplitude;
  const Update<T> update(k, amplitude);
  if (amplitude == 0) {
    if (update.k != 1) scale(span, pieces, update, a.status);
    return;
  }
  float z[kGroup<T>];
  if (in_step) {
    for_each_group<T>(pieces, [&](int j, int at) {
      noise_of_group<kGroup<T>>(key, span.index + at, z);
      groups[j].transform([&](int i, Compute g) { return update(g, z[i]); });
      groups[j].store(span.data + at);
    });
  } else {
    _Pragma("unroll 1") for (int group = static_cast<int>(threadIdx.x); group < pieces.groups;
                             group += kThreads) {
      const int at = pieces.group_at(group);
      groups[0].load(span.data + at);
      noise_across_blocks<kGroup<T>>(key, span.index + at, z);
      groups[0].transform([&](int i, Compute g) { return update(g, z[i]); });
      groups[0].store(span.data + at);
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces.single(thread)) {
    const int at = pieces.single_at(thread);
    const float noise = noise_of_element(key, span.index + at);
    span.data[at] = Element<T>::to(update(Element<T>::from(span.data[at]), noise));
  }
}

__global__ __launch_bounds__(kThreads, 4) void apply_kernel(const Application __grid_constant__ a) {
  // Backwards: what was measured last is still in the second-level cache.
  const int chunk = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int t = tensor_of_chunk(a.tensors, chunk);
  const float k = usable_coefficient(a.coefficients[a.tensors.modality[t]]);
  const bool noisy = a.noise != 0;
  with_type(static_cast<DType>(a.tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    const auto span = span_of_chunk<T>(a.tensors.data[t], a.tensors.count[t], a.tensors.offset[t],
                                       chunk - a.tensors.begin[t]);
    if (noisy) {
      apply_noisy(span, a, k, noise_key(a.source, a.tensors.id[t]),
                  a.moments + 3 * int64_t{a.tensors.row[t]});
    } else if (k != 1 || a.status) {
      scale(span, Pieces<kGroup<T>>(span), Update<T>(k, 0.0), a.status);
    }
  });
  // Every thread has read the step before the barrier in apply_noisy.
  if (a.advance && threadIdx.x == 0 && last_to_arrive(a.block_counter, gridDim.x)) ++*a.advance;
}

struct Counter {
  int64_t* value;
};

__global__ void advance_kernel(const Counter __grid_constant__ counter) { ++*counter.value; }

}  // namespace

void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation,
              const Queue& queue) {
  const DeviceGuard guard(queue.device);
  if (count == 0) {
    if (modulation.advance) launch(advance_kernel, dim3(1), 1, queue, Counter{modulation.advance});
    return;
  }
  const Workspace workspace(queue.workspace);
  const bool measured = modulation.noise != 0 && modulation.moments == nullptr;
  Application application;
  application.coefficients = modulation.coefficients;
  application.noise = modulation.noise;
  application.eps = modulation.eps;
  application.source = modulation.source;
  application.moments = measured ? workspace.rows : modulation.moments;
  application.status = modulation.status;
  application.block_counter = workspace.block_counter;
  for (int64_t first = 0; first < count;) {
    first += application.tensors.fill(gradients, first, count, measured);
    application.advance = first == count ? modulation.advance : nullptr;
    if (measured) launch_moments(application.tensors, workspace.rows, workspace, queue);
    launch(apply_kernel, dim3(static_cast<unsigned>(application.tensors.chunks())), kThreads, queue,
           application);
  }
}

}  // namespace mmbal::cuda
