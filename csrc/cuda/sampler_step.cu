// sampler_step on a GPU: one launch forward, one backward. Forward, the sums over a sample are taken in kShares shares
// that are added in order: a cluster has a block for each, and where there are no clusters one block takes all of them,
// with the same bits. No workspace, no atomics, and the same order whatever the batch.
#include "sampler_step.h"

#include <type_traits>

#include "block.h"
#include "launch.h"

namespace rftcore::cuda {

using sampler_step::Backward;
using sampler_step::Coefficients;
using sampler_step::Divergence;
using sampler_step::Forward;
using sampler_step::Problem;

namespace {

constexpr int kThreads = 256;
// What leaves so many registers that none are spilled, and enough threads to wait for memory.
constexpr int kBlocksPerProcessor = 2;
constexpr int kShares = 8;
// Elements that a thread takes at a time: 16 bytes of a 16-bit type, 32 of fp32; of fp64 as many as fit its registers.
template <class T>
constexpr int kRun = std::is_same_v<T, double> ? 2 : 8;

// A run of elements of one sample.
template <int kCount>
struct Run {
  int64_t first;
  int count;

  __device__ __forceinline__ Run(const Problem& p, int64_t sample, int64_t run)
      : first(sample * p.elements + run * kCount) {
    const int64_t left = p.elements - run * kCount;
    count = int(left < kCount ? left : kCount);
  }
};

// `whole`: every run has kCount elements and every tensor can be read 16 bytes at a time. What lies beyond a run is 0.
template <bool whole, class Stored, int kCount>
__device__ __forceinline__ Pack<Stored, kCount> load(const void* from, const Run<kCount>& run, int64_t offset = 0) {
  const Stored* const values = static_cast<const Stored*>(from) + run.first + offset;
  Pack<Stored, kCount> pack = {};
  if constexpr (whole) {
    pack = Pack<Stored, kCount>::load(values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < run.count) pack.values[i] = values[i];
  }
  return pack;
}

template <bool whole, class Stored, int kCount>
__device__ __forceinline__ void store(const Pack<Stored, kCount>& pack, void* to, const Run<kCount>& run,
                                      int64_t offset = 0) {
  Stored* const values = static_cast<Stored*>(to) + run.first + offset;
  if constexpr (whole) {
    pack.store(values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < run.count) values[i] = pack.values[i];
  }
}

// A run of the model's output, as it lies in memory: all loads are under way before a value is needed.
template <class Output, int kCount>
struct OutputRun {
  Pack<Output, kCount> negative, positive;

  template <class T>
  __device__ __forceinline__ T guided(const Problem& p, const Coefficients<T>& c, int i) const {
    const T value = convert<T>(negative.values[i]);
    return p.guided ? guide(c, value, convert<T>(positive.values[i])) : value;
  }
};

template <bool whole, class Output, int kCount>
__device__ __forceinline__ OutputRun<Output, kCount> load_output(const Problem& p, const void* output,
                                                                 const Run<kCount>& run) {
  OutputRun<Output, kCount> loaded = {};
  loaded.negative = load<whole, Output>(output, run);
  if (p.guided) loaded.positive = load<whole, Output>(output, run, p.batch * p.elements);
  return loaded;
}

struct Sums {
  double log_prob, distance;
};

// The block's sums, on thread 0, in an order that never changes.
__device__ Sums block_sums(Sums sums, Sums* warps) {
  sums = {lane_sum(sums.log_prob, kWarp), lane_sum(sums.distance, kWarp)};
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  Sums total = {};
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      total.log_prob += warps[warp].log_prob;
      total.distance += warps[warp].distance;
    }
  __syncthreads();  // `warps` may be used again
  return total;
}

template <bool whole, class Sample, class Output, class T, int kCount>
__device__ __forceinline__ void forward_run(const Forward& a, const Coefficients<T>& c, T inverse_sigma,
                                            const Run<kCount>& run, T& sum, T& distance_sum) {
  const auto x_run = load<whole, Sample>(a.sample, run);
  const auto m_run = load_output<whole, Output>(a, a.model_output, run);
  Pack<Sample, kCount> other = {};
  if (a.next_given)
    other = load<whole, Sample>(a.next_given, run);
  else if (a.noise)
    other = load<whole, Sample>(a.noise, run);
  OutputRun<Output, kCount> reference = {};
  if (a.divergence != Divergence::none) reference = load_output<whole, Output>(a, a.reference_output, run);

  Pack<Sample, kCount> next = other;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!whole && i >= run.count) break;
    const T x = convert<T>(x_run.values[i]), m = m_run.guided(a, c, i), mean = predict_mean(c, x, m);
    // Rounded before it is scored: scoring this next sample later gives the same bits.
    if (!a.next_given)
      next.values[i] = convert<Sample>(a.noise ? mean + c.sigma * convert<T>(other.values[i]) : mean);
    sum += sampler_step::scaled_square(convert<T>(next.values[i]), mean, inverse_sigma);
    if (a.divergence == Divergence::none) continue;
    const T reference_m = reference.guided(a, c, i);
    distance_sum += a.divergence == Divergence::exact
                        ? sampler_step::scaled_square(mean, predict_mean(c, x, reference_m), inverse_sigma)
                        : sampler_step::scaled_square(m, reference_m, c.eps_from_output);
  }
  if (!a.next_given) store<whole>(next, a.next, run);
}

template <class Sample, class Output, class T, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    forward_kernel(const __grid_constant__ Forward a, int blocks) {
  const Cluster cluster = {blocks};
  auto* const warps = reinterpret_cast<Sums*>(shared_memory());
  Sums* const totals = warps + kThreads / kWarp;  // (kShares,); each block has its own shares'
  const int64_t sample = blockIdx.x / unsigned(blocks);
  const Coefficients<T> c = sampler_step::coefficients_of<T>(a, a.coefficients, sample);
  const T inverse_sigma = c.inverse_sigma();
  const int64_t runs = (a.elements + kRun<T> - 1) / kRun<T>, per_share = (runs + kShares - 1) / kShares;
  for (int share = cluster.rank(); share < kShares; share += blocks) {
    const int64_t end = (share + 1) * per_share < runs ? (share + 1) * per_share : runs;
    T sum = 0, distance_sum = 0;
    for (int64_t run = share * per_share + threadIdx.x; run < end; run += kThreads)
      forward_run<whole, Sample, Output>(a, c, inverse_sigma, Run<kRun<T>>(a, sample, run), sum, distance_sum);
    const Sums of_share = block_sums({double(sum), double(distance_sum)}, warps);
    if (threadIdx.x == 0) totals[share] = of_share;
  }
  cluster.arrive();
  cluster.wait();
  if (cluster.rank() == 0 && threadIdx.x == 0) {
    Sums total = {};
    for (int share = 0; share < kShares; ++share) {
      const Sums& of_share = *cluster.at(totals + share, share % blocks);
      total.log_prob += of_share.log_prob;
      total.distance += of_share.distance;
    }
    static_cast<T*>(a.log_prob)[sample] = log_prob(c, total.log_prob, a.elements);
    if (a.divergence != Divergence::none)
      static_cast<T*>(a.distance)[sample] = distance(c, a.divergence, total.distance, a.elements);
  }
  // No block may end while the first reads its shared memory.
  cluster.arrive();
  cluster.wait();
}

template <class Sample, class Output, class T, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    backward_kernel(const __grid_constant__ Backward a, int64_t blocks_per_sample) {
  const int64_t sample = blockIdx.x / blocks_per_sample;
  const Coefficients<T> c = sampler_step::coefficients_of<T>(a, a.coefficients, sample);
  const auto weights = backward_weights(c, a, sample);
  const bool diverges = a.divergence != Divergence::none && a.grad_distance;
  constexpr int kCount = kRun<T>;
  const int64_t index = blockIdx.x % blocks_per_sample * kThreads + threadIdx.x;
  if (index * kCount >= a.elements) return;

  const Run<kCount> run(a, sample, index);
  const auto x_run = load<whole, Sample>(a.sample, run);
  const auto m_run = load_output<whole, Output>(a, a.model_output, run);
  const auto next = load<whole, Sample>(a.next, run);
  Pack<Sample, kCount> grad_next = {};
  if (a.grad_next) grad_next = load<whole, Sample>(a.grad_next, run);
  OutputRun<Output, kCount> reference = {};
  if (diverges) reference = load_output<whole, Output>(a, a.reference_output, run);

  Pack<Sample, kCount> grad_sample = {};
  Pack<Output, kCount> grad_negative = {}, grad_positive = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!whole && i >= run.count) break;
    const T x = convert<T>(x_run.values[i]), m = m_run.guided(a, c, i);
    auto grad = element_gradient(c, weights, x, m, convert<T>(next.values[i]),
                                 a.grad_next ? convert<T>(grad_next.values[i]) : T(0));
    if (diverges) {
      const auto more = divergence_gradient(c, weights, a.divergence, x, m, reference.guided(a, c, i));
      grad.sample += more.sample;
      grad.output += more.output;
    }
    grad_sample.values[i] = convert<Sample>(grad.sample);
    const T guided = c.guidance * grad.output;
    grad_negative.values[i] = convert<Output>(a.guided ? grad.output - guided : grad.output);
    grad_positive.values[i] = convert<Output>(guided);
  }
  if (a.grad_sample) store<whole>(grad_sample, a.grad_sample, run);
  if (!a.grad_output) return;
  store<whole>(grad_negative, a.grad_output, run);
  if (a.guided) store<whole>(grad_positive, a.grad_output, run, a.batch * a.elements);
}

int64_t elements_of_run(const Problem& p) {
  return p.sample_dtype == 0 || p.output_dtype == 0 ? kRun<double> : kRun<float>;
}

// Calls function(sample, output, whole) with values of the storage types, and std::bool_constant.
template <class Function>
void with_types(const Problem& p, bool is_aligned, const Function& function) {
  with_dtype(p.sample_dtype, [&](auto sample) {
    with_dtype(p.output_dtype, [&](auto output) {
      is_aligned && p.elements % elements_of_run(p) == 0 ? function(sample, output, std::true_type{})
                                           : function(sample, output, std::false_type{});
    });
  });
}

}  // namespace

void sampler_step_forward(const Forward& a, uintptr_t stream) {
  if (a.batch == 0) return;
  const char* const name = "sampler_step_forward";
  const bool is_aligned = aligned(a.sample, a.model_output, a.noise, a.next_given, a.reference_output, a.next);
  with_types(a, is_aligned, [&](auto sample, auto output, auto whole) {
    using Sample = decltype(sample);
    using Output = decltype(output);
    const auto kernel = forward_kernel<Sample, Output, maths_type<Sample, Output>, whole()>;
    const int blocks = architecture_of(name, kernel) >= 90 ? kShares : 1;
    const Grid grid = {a.batch * blocks, kThreads, (kThreads / kWarp + kShares) * int64_t(sizeof(Sums)), blocks};
    launch(name, kernel, grid, stream, a, blocks);
  });
}

void sampler_step_backward(const Backward& a, uintptr_t stream) {
  if (a.batch == 0 || a.elements == 0) return;
  const int64_t per_block = kThreads * elements_of_run(a), blocks = (a.elements + per_block - 1) / per_block;
  const Grid grid = {a.batch * blocks, kThreads};
  const bool is_aligned = aligned(a.sample, a.model_output, a.next, a.reference_output, a.grad_next, a.grad_sample,
                                  a.grad_output);
  with_types(a, is_aligned, [&](auto sample, auto output, auto whole) {
    using Sample = decltype(sample);
    using Output = decltype(output);
    launch("sampler_step_backward", backward_kernel<Sample, Output, maths_type<Sample, Output>, whole()>, grid, stream,
           a, blocks);
  });
}

}  // namespace rftcore::cuda
