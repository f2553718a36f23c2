// The update g <- k g + N(0, std(g) + eps), in place, a block per chunk.
#include "cuda/noise.h"
#include "math/modulation.h"

namespace mmbal::cuda {
namespace {

struct Settings {
  const float* coefficients;
  double noise;
  double eps;
  NoiseSource source;
  const double* moments;  // [rows, 3], read where noise is not 0
  int32_t* status;        // may be null
  int64_t* advance;       // may be null
  const float* inverse_scale;
  float* found_inf;
  uint32_t* block_counter;
};

template <int kCapacity>
struct Application {
  Settings settings;
  Tensors<kCapacity> tensors;
};
static_assert(sizeof(Application<kFew>) <= 4096, "see kFew");

// What elements become: bit for bit what csrc/cpu computes.
template <class T>
struct Update {
  float k, amplitude;

  __device__ __forceinline__ Update(float coefficient, double scale)
      : k(coefficient), amplitude(static_cast<float>(scale)) {}
  __device__ __forceinline__ float operator()(float g, float z) const {
    return Scalar::fma(amplitude, z, k * g);
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
};

// Elements from a thread's group to its next one.
template <class T>
constexpr int kStride = kThreads * kGroup<T>;

// Walks the groups of the calling thread with kAhead of them in registers. Not all at once: the
// loop keeps what its rounds share, the keys of Philox above all, where straight code would compute
// it again and again.
template <class T>
class Walk {
 public:
  static constexpr int kAhead = kGroups<T> > 1 && sizeof(T) < 8 ? kGroups<T> / 2 : 1;

  __device__ __forceinline__ Walk(const Span<T>& span, const Pieces<kGroup<T>>& pieces)
      : at_(span.data + pieces.group_at(static_cast<int>(threadIdx.x))),
        left_(pieces.groups - static_cast<int>(threadIdx.x)) {}

  __device__ __forceinline__ bool more() const { return left_ > 0; }
  __device__ __forceinline__ void load() {
    MMBAL_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (j * kThreads < left_) groups_[j].load(at_ + j * kStride<T>);
    }
  }
  // f(group, its address, its position in the round)
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    MMBAL_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (j * kThreads < left_) f(groups_[j], at_ + j * kStride<T>, j);
    }
  }
  __device__ __forceinline__ void next() {
    at_ += kAhead * kStride<T>;
    left_ -= kAhead * kThreads;
  }

 private:
  Group<T> groups_[kAhead];
  T* at_;
  int left_;
};

template <class T, class Unscaling>
__device__ __forceinline__ void scale(const Span<T>& span, Unscaling& unscaling, float k,
                                      int32_t* status) {
  using Compute = typename Element<T>::Compute;
  const Pieces<kGroup<T>> pieces(span);
  const bool writes = k != 1 || unscaling.changes();
  Compute finite = 0;  // becomes NaN where an element is NaN or Inf
  const auto scaled = [&](int, Compute g) {
    finite += g * 0;
    return k * g;
  };
  MMBAL_UNROLL_BY(1)
  for (Walk<T> walk(span, pieces); walk.more(); walk.next()) {
    walk.load();
    walk.each([&](Group<T>& group, T* at, int) {
      group.each_packet(unscaling);
      group.transform(scaled);
      if (writes) group.store(at);
    });
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces.single(thread)) {
    T& place = span.data[pieces.single_at(thread)];
    const T element = unscaling(place);
    const Compute y = scaled(0, Element<T>::from(element));
    if (writes) place = Element<T>::saturate(element, Element<T>::to(y));
  }
  if (status && finite != 0) atomicOr(status, kNonFiniteGradient);
}

// Calls step_read() once no thread of the block will read the step any more.
template <class T, class Unscaling, class StepRead>
__device__ __forceinline__ void scale_and_add_noise(const Span<T>& span, Unscaling& unscaling,
                                                    const Settings& settings, float k,
                                                    const NoiseKey& key, const double* row,
                                                    StepRead&& step_read) {
  using Compute = typename Element<T>::Compute;
  __shared__ double shared_amplitude;
  const Pieces<kGroup<T>> pieces(span);
  const int thread = static_cast<int>(threadIdx.x);
  const Moments moments{row[0], row[1], row[2]};
  // Whether blocks of noise begin where groups do.
  const bool in_step = ((span.index + static_cast<uint64_t>(pieces.head)) & 3) == 0;
  Walk<T> walk(span, pieces);
  if (in_step) walk.load();
  if (thread == 0) {  // while the loads are on their way
    shared_amplitude = noise_amplitude(moments, k, settings.noise, settings.eps, kLargest<T>);
    if (settings.status && !is_finite(moments.m2)) atomicOr(settings.status, kNonFiniteGradient);
  }
  __syncthreads();
  step_read();
  const double amplitude = shared_amplitude;
  if (amplitude == 0) {
    if (Unscaling::kActive || k != 1) scale(span, unscaling, k, settings.status);
    return;
  }
  const Update<T> update(k, amplitude);
  const auto finish = [&](Group<T>& group, T* at, const float* z) {
    group.each_packet(unscaling);
    group.transform([&](int i, Compute g) { return update(g, z[i]); });
    group.store(at);
  };
  const auto index = [&](int at) { return span.index + static_cast<uint64_t>(at); };
  if (in_step) {
    uint64_t block = index(pieces.group_at(thread)) >> 2;
    MMBAL_UNROLL_BY(1)
    while (walk.more()) {
      walk.each([&](Group<T>& group, T* at, int j) {
        float z[kGroup<T>];
        noise_of_blocks<kGroup<T>>(key, block + j * (kStride<T> / 4), z);
        finish(group, at, z);
      });
      block += Walk<T>::kAhead * (kStride<T> / 4);
      walk.next();
      walk.load();
    }
  } else {
    MMBAL_UNROLL_BY(1)
    for (int g = thread; g < pieces.groups; g += kThreads) {
      const int at = pieces.group_at(g);
      Group<T> group;
      group.load(span.data + at);
      float z[kGroup<T>];
      noise_across_blocks<kGroup<T>>(key, index(at), z);
      finish(group, span.data + at, z);
    }
  }
  if (pieces.single(thread)) {
    const int at = pieces.single_at(thread);
    const float noise = noise_of_element(key, index(at));
    const T element = unscaling(span.data[at]);
    span.data[at] =
        Element<T>::saturate(element, Element<T>::to(update(Element<T>::from(element), noise)));
  }
}

template <int kCapacity, bool kUnscales>
__global__ __launch_bounds__(kThreads, 4) void apply_kernel(
    const Application<kCapacity> __grid_constant__ a) {
  // Backwards: what was measured last is still in the second-level cache.
  const int chunk = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int t = tensor_of_chunk(a.tensors, chunk);
  const Settings& settings = a.settings;
  const float k = usable_coefficient(settings.coefficients[a.tensors.modality[t]]);
  // Early, so that the answer is there when the block ends.
  uint32_t arrived = 0;
  const auto step_read = [&] {
    if (settings.advance && threadIdx.x == 0) arrived = arrive(settings.block_counter);
  };
  with_type(static_cast<DType>(a.tensors.dtype[t]), [&](auto type) {
    using T = decltype(type);
    const auto span = span_of_chunk<T>(a.tensors.data[t], a.tensors.count[t], a.tensors.offset[t],
                                       chunk - a.tensors.begin[t]);
    Unscaling<T, kUnscales> unscaling(settings.inverse_scale);
    if (settings.noise != 0) {
      scale_and_add_noise(span, unscaling, settings, k, noise_key(settings.source, a.tensors.id[t]),
                          settings.moments + 3 * int64_t{a.tensors.row[t]}, step_read);
    } else {
      step_read();
      if (kUnscales || k != 1 || settings.status) scale(span, unscaling, k, settings.status);
    }
    if (unscaling.found_inf()) atomicExch(settings.found_inf, 1.0f);
  });
  if (settings.advance && threadIdx.x == 0 && arrived == gridDim.x - 1) {
    *settings.block_counter = 0;
    ++*settings.advance;
  }
}

struct Counter {
  int64_t* value;
};

__global__ void advance_kernel(const Counter __grid_constant__ counter) { ++*counter.value; }

template <int kCapacity>
void modulate_all(const Gradient* gradient, const Gradient* end, const Modulation& modulation,
                  const Queue& queue) {
  const Workspace workspace(queue.workspace);
  const bool measured = modulation.noise != 0 && modulation.moments == nullptr;
  Application<kCapacity> application;
  Settings& settings = application.settings;
  settings.coefficients = modulation.coefficients;
  settings.noise = modulation.noise;
  settings.eps = modulation.eps;
  settings.source = modulation.source;
  settings.moments = measured ? workspace.rows : modulation.moments;
  settings.status = modulation.status;
  settings.inverse_scale = modulation.inverse_scale;
  settings.found_inf = modulation.found_inf;
  settings.block_counter = workspace.block_counter;
  const auto apply =
      modulation.inverse_scale ? apply_kernel<kCapacity, true> : apply_kernel<kCapacity, false>;
  while (gradient != end) {
    gradient = application.tensors.fill(gradient, end, measured);
    settings.advance = gradient == end ? modulation.advance : nullptr;
    if (measured) {
      launch_moments(application.tensors, modulation.inverse_scale, workspace.rows, workspace,
                     queue);
    }
    launch(apply, dim3(static_cast<unsigned>(application.tensors.chunks())), kThreads, queue,
           application);
  }
}

}  // namespace

void modulate(const Gradient* gradients, int64_t count, const Modulation& modulation,
              const Queue& queue) {
  const DeviceGuard guard(queue.device);
  if (count > 0) {
    (count <= kFew ? modulate_all<kFew> : modulate_all<kMany>)(gradients, gradients + count,
                                                               modulation, queue);
  } else if (modulation.advance) {
    launch(advance_kernel, dim3(1), 1, queue, Counter{modulation.advance});
  }
}

}  // namespace mmbal::cuda
