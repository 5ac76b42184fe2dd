// sampler_step on a GPU: one launch forward, one backward. Forward, one thread block takes one sample, so that its sums
// stay in the block: no workspace, no atomics, no second launch, and the same order whatever the batch. A latent is 64
// to 256 KiB, a few us for one multiprocessor.
#include "sampler_step.h"

#include <algorithm>

#include "launch.h"

namespace rftcore::cuda {

using sampler_step::Backward;
using sampler_step::Coefficients;
using sampler_step::Divergence;
using sampler_step::Forward;
using sampler_step::Problem;

namespace {

constexpr int kWarp = 32;
constexpr int kForwardThreads = 512;
constexpr int kBackwardThreads = 256;
constexpr int64_t kMaxGridY = 65535;

template <class Stored, class T>
__device__ __forceinline__ T load(const void* from, int64_t index) {
  return convert<T>(static_cast<const Stored*>(from)[index]);
}

template <class Stored, class T>
__device__ __forceinline__ void store(void* to, int64_t index, T value) {
  static_cast<Stored*>(to)[index] = convert<Stored>(value);
}

// The guided model output.
template <class Output, class T>
__device__ __forceinline__ T load_output(const Problem& problem, const Coefficients<T>& c, const void* output,
                                         int64_t index) {
  const T negative = load<Output, T>(output, index);
  if (!problem.guided) return negative;
  return guide(c, negative, load<Output, T>(output, index + problem.batch * problem.elements));
}

// The block's sum of `value`, on thread 0, in an order that never changes.
__device__ double block_sum(double value) {
  __shared__ double warps[kForwardThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (double warp : warps) sum += warp;
  __syncthreads();  // `warps` may be used again
  return sum;
}

template <class Sample, class Output, class T>
__global__ void __launch_bounds__(kForwardThreads) forward_kernel(const __grid_constant__ Forward a) {
  const int64_t sample = blockIdx.x;
  const Coefficients<T> c = sampler_step::coefficients_of<T>(a, a.coefficients, sample);
  const T inverse_sigma = c.inverse_sigma();
  T sum = 0, distance_sum = 0;
  for (int64_t i = threadIdx.x; i < a.elements; i += kForwardThreads) {
    const int64_t index = sample * a.elements + i;
    const T x = load<Sample, T>(a.sample, index);
    const T m = load_output<Output, T>(a, c, a.model_output, index);
    const T mean = predict_mean(c, x, m);
    T next;
    if (a.next_given) {
      next = load<Sample, T>(a.next_given, index);
    } else {
      const Sample rounded = convert<Sample>(a.noise ? mean + c.sigma * load<Sample, T>(a.noise, index) : mean);
      static_cast<Sample*>(a.next)[index] = rounded;
      // Rounded: scoring this next sample later gives the same bits.
      next = convert<T>(rounded);
    }
    sum += sampler_step::scaled_square(next, mean, inverse_sigma);
    if (a.divergence != Divergence::none) {
      const T reference_m = load_output<Output, T>(a, c, a.reference_output, index);
      distance_sum += a.divergence == Divergence::exact
                          ? sampler_step::scaled_square(mean, predict_mean(c, x, reference_m), inverse_sigma)
                          : sampler_step::scaled_square(m, reference_m, c.eps_from_output);
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) static_cast<T*>(a.log_prob)[sample] = log_prob(c, total, a.elements);
  if (a.divergence == Divergence::none) return;
  const double distance_total = block_sum(distance_sum);
  if (threadIdx.x == 0)
    static_cast<T*>(a.distance)[sample] = distance(c, a.divergence, distance_total, a.elements);
}

template <class Sample, class Output, class T>
__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(const __grid_constant__ Backward a) {
  const int64_t sample = blockIdx.x;
  const Coefficients<T> c = sampler_step::coefficients_of<T>(a, a.coefficients, sample);
  const auto weights = backward_weights(c, a, sample);
  const int64_t stride = int64_t(gridDim.y) * kBackwardThreads;
  for (int64_t i = int64_t(blockIdx.y) * kBackwardThreads + threadIdx.x; i < a.elements; i += stride) {
    const int64_t index = sample * a.elements + i;
    const T x = load<Sample, T>(a.sample, index);
    const T m = load_output<Output, T>(a, c, a.model_output, index);
    auto grad = element_gradient(c, weights, x, m, load<Sample, T>(a.next, index),
                                 a.grad_next ? load<Sample, T>(a.grad_next, index) : T(0));
    if (a.divergence != Divergence::none && a.grad_distance) {
      const T reference_m = load_output<Output, T>(a, c, a.reference_output, index);
      const auto more = divergence_gradient(c, weights, a.divergence, x, m, reference_m);
      grad.sample += more.sample;
      grad.output += more.output;
    }
    if (a.grad_sample) store<Sample>(a.grad_sample, index, grad.sample);
    if (!a.grad_output) continue;
    if (a.guided) {
      const T guided = c.guidance * grad.output;
      store<Output>(a.grad_output, index, grad.output - guided);
      store<Output>(a.grad_output, index + a.batch * a.elements, guided);
    } else {
      store<Output>(a.grad_output, index, grad.output);
    }
  }
}

}  // namespace

void sampler_step_forward(const Forward& a, uintptr_t stream) {
  if (a.batch == 0) return;
  with_dtype(a.sample_dtype, [&](auto sample) {
    with_dtype(a.output_dtype, [&](auto output) {
      using Sample = decltype(sample);
      using Output = decltype(output);
      forward_kernel<Sample, Output, maths_type<Sample, Output>>
          <<<dim3(unsigned(a.batch)), kForwardThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(a);
    });
  });
  check_launch("sampler_step_forward");
}

void sampler_step_backward(const Backward& a, uintptr_t stream) {
  if (a.batch == 0 || a.elements == 0) return;
  const int64_t blocks = std::min((a.elements + kBackwardThreads - 1) / kBackwardThreads, kMaxGridY);
  with_dtype(a.sample_dtype, [&](auto sample) {
    with_dtype(a.output_dtype, [&](auto output) {
      using Sample = decltype(sample);
      using Output = decltype(output);
      backward_kernel<Sample, Output, maths_type<Sample, Output>>
          <<<dim3(unsigned(a.batch), unsigned(blocks)), kBackwardThreads, 0,
             reinterpret_cast<cudaStream_t>(stream)>>>(a);
    });
  });
  check_launch("sampler_step_backward");
}

}  // namespace rftcore::cuda
