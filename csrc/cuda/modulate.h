// The update g <- k g + N(0, std(g) + eps) of a chunk, in place.
#pragma once

#include "cuda/noise.h"
#include "math/modulation.h"

namespace mmbal::cuda {

// Gradients whose moments are to be measured: one launch for that and the update, several where
// they are more than one can hold.
void modulate_in_one_launch(const Modulation& modulation, const Cuda& cuda);

namespace {

struct Settings {
  const float* coefficients;
  double noise;
  double eps;
  NoiseSource source;
  const double* moments;  // [rows, 3], read where noise is not 0
  int32_t* status;        // may be null
  int64_t* advance;       // may be null: set for the last launch of a step
  const float* inverse_scale;
  float* found_inf;
  uint32_t* block_counter;
};

inline Settings settings_of(const Modulation& modulation, const double* moments,
                            const Workspace& workspace) {
  return {modulation.coefficients,
          modulation.noise,
          modulation.eps,
          modulation.source,
          moments,
          modulation.status,
          nullptr,
          modulation.inverse_scale,
          modulation.found_inf,
          workspace.block_counter};
}

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

// Thread 0 calls measured() before it reads the moments; all call step_read() once no thread of the
// block will read the step any more.
template <class T, class Unscaling, class Measured, class StepRead>
__device__ __forceinline__ void scale_and_add_noise(const Span<T>& span, Unscaling& unscaling,
                                                    const Settings& settings, float k,
                                                    const NoiseKey& key, const double* row,
                                                    Measured&& measured, StepRead&& step_read) {
  using Compute = typename Element<T>::Compute;
  __shared__ double shared_amplitude;
  const Pieces<kGroup<T>> pieces(span);
  const int thread = static_cast<int>(threadIdx.x);
  // Whether blocks of noise begin where groups do.
  const bool in_step = ((span.index + static_cast<uint64_t>(pieces.head)) & 3) == 0;
  Walk<T> walk(span, pieces);
  if (in_step) walk.load();
  if (thread == 0) {  // while the loads are on their way
    measured();
    // Perhaps written in this very launch, by another block: past this multiprocessor's cache.
    const Moments moments{__ldcg(row), __ldcg(row + 1), __ldcg(row + 2)};
    shared_amplitude = noise_amplitude(moments, k, settings.noise, settings.eps, kLargest<T>);
    if (settings.status && !holds_numbers(moments)) atomicOr(settings.status, kNonFiniteGradient);
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

// Updates a chunk of tensor t, by one block of as many as there are chunks; the last of them counts
// the step up. measured() is as in scale_and_add_noise.
template <bool kUnscales, int kCapacity, class Measured>
__device__ __forceinline__ void apply_chunk(const Application<kCapacity>& a, int chunk, int t,
                                            Measured&& measured) {
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
                          settings.moments + 3 * int64_t{a.tensors.row[t]}, measured, step_read);
    } else {
      step_read();
      if (kUnscales || k != 1 || settings.status) scale(span, unscaling, k, settings.status);
    }
    if (unscaling.found_inf()) atomicExch(settings.found_inf, 1.0f);
  });
  if (settings.advance && threadIdx.x == 0 &&
      arrived == static_cast<uint32_t>(a.tensors.chunks()) - 1) {
    *settings.block_counter = 0;
    ++*settings.advance;
  }
}

}  // namespace
}  // namespace mmbal::cuda
