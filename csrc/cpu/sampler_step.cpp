// sampler_step on the CPU. Each sample is cut into blocks that fit in the first-level cache; a block is loaded,
// computed and stored by the vector loops below. A sum is taken per block and the blocks' sums are added in order,
// so that a result depends neither on the number of threads nor on the rest of the batch.
#include "sampler_step.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace rftcore::cpu {

using sampler_step::Backward;
using sampler_step::BackwardWeights;
using sampler_step::Coefficients;
using sampler_step::Divergence;
using sampler_step::Forward;
using sampler_step::Problem;

namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLanes = 16;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kBlocksPerThread = 256;

template <class T>
struct Buffer {
  alignas(64) T values[kBlock];
};

template <class From, class To>
RFTCORE_SIMD void convert_all(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<To>(from[i]);
}

// `count` values from `from[offset]` on, in the maths type: in place where that is how they are stored.
template <class Stored, class T>
const T* load(const void* from, int64_t offset, int64_t count, Buffer<T>& buffer) {
  const Stored* values = static_cast<const Stored*>(from) + offset;
  if constexpr (std::is_same_v<Stored, T>) {
    return values;
  } else {
    convert_all(values, buffer.values, count);
    return buffer.values;
  }
}

template <class Stored, class T>
void store(const T* from, void* to, int64_t offset, int64_t count) {
  Stored* values = static_cast<Stored*>(to) + offset;
  if constexpr (std::is_same_v<Stored, T>) {
    std::copy_n(from, count, values);
  } else {
    convert_all(from, values, count);
  }
}

template <class T>
RFTCORE_SIMD void guide_all(Coefficients<T> c, const T* negative, const T* positive, T* m, int64_t count) {
  for (int64_t i = 0; i < count; ++i) m[i] = guide(c, negative[i], positive[i]);
}

template <class T>
RFTCORE_SIMD void predict_means(Coefficients<T> c, const T* x, const T* m, T* __restrict mean, int64_t count) {
  for (int64_t i = 0; i < count; ++i) mean[i] = predict_mean(c, x[i], m[i]);
}

template <class T>
RFTCORE_SIMD void add_noise(T sigma, const T* mean, const T* noise, T* next, int64_t count) {
  for (int64_t i = 0; i < count; ++i) next[i] = mean[i] + sigma * noise[i];
}

template <class T>
RFTCORE_SIMD double sum_of_scaled_squares(const T* a, const T* b, T scale, int64_t count) {
  T lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] += sampler_step::scaled_square(a[i + lane], b[i + lane], scale);
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += sampler_step::scaled_square(a[i], b[i], scale);
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <class T>
RFTCORE_SIMD void element_gradients(Coefficients<T> c, BackwardWeights<T> weights, const T* x, const T* m,
                                    const T* next, const T* grad_next, T* __restrict grad_x, T* __restrict grad_m,
                                    int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto grad = element_gradient(c, weights, x[i], m[i], next[i], grad_next[i]);
    grad_x[i] = grad.sample;
    grad_m[i] = grad.output;
  }
}

template <class T>
RFTCORE_SIMD void add_divergence_gradients(Coefficients<T> c, BackwardWeights<T> weights, Divergence kind, const T* x,
                                           const T* m, const T* reference_m, T* __restrict grad_x,
                                           T* __restrict grad_m, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto grad = divergence_gradient(c, weights, kind, x[i], m[i], reference_m[i]);
    grad_x[i] += grad.sample;
    grad_m[i] += grad.output;
  }
}

// From the gradient of the guided m to those of [negative; positive].
template <class T>
RFTCORE_SIMD void unguide_all(Coefficients<T> c, const T* grad_m, T* __restrict negative, T* __restrict positive,
                              int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T guided = c.guidance * grad_m[i];
    negative[i] = grad_m[i] - guided;
    positive[i] = guided;
  }
}

struct Block {
  int64_t sample, offset, count;  // offset: from the first sample's first element
};

Block block_at(const Problem& problem, int64_t blocks_per_sample, int64_t index) {
  const int64_t sample = index / blocks_per_sample;
  const int64_t begin = index % blocks_per_sample * kBlock;
  return {sample, sample * problem.elements + begin, std::min(kBlock, problem.elements - begin)};
}

// The guided model output of a block.
template <class Output, class T>
const T* load_output(const Problem& problem, const Coefficients<T>& c, const void* output, const Block& block,
                     Buffer<T>& buffer) {
  if (!problem.guided) return load<Output>(output, block.offset, block.count, buffer);
  Buffer<T> other;
  const T* negative = load<Output>(output, block.offset, block.count, buffer);
  const T* positive = load<Output>(output, block.offset + problem.batch * problem.elements, block.count, other);
  guide_all(c, negative, positive, buffer.values, block.count);
  return buffer.values;
}

struct Sums {
  double log_prob = 0, distance = 0;
};

template <class Sample, class Output, class T>
Sums forward_block(const Forward& a, const Block& block) {
  const Coefficients<T>& c = sampler_step::coefficients_of<T>(a, a.coefficients, block.sample);
  Buffer<T> x_buffer, m_buffer, mean, next_buffer, reference_buffer;
  const T* x = load<Sample>(a.sample, block.offset, block.count, x_buffer);
  const T* m = load_output<Output>(a, c, a.model_output, block, m_buffer);
  predict_means(c, x, m, mean.values, block.count);

  const void* stepped = a.next_given;
  if (!stepped) {
    const T* unrounded = mean.values;
    if (a.noise) {
      add_noise(c.sigma, mean.values, load<Sample>(a.noise, block.offset, block.count, next_buffer),
                next_buffer.values, block.count);
      unrounded = next_buffer.values;
    }
    store<Sample>(unrounded, a.next, block.offset, block.count);
    stepped = a.next;
  }
  // Read back, rounded: scoring this next sample later gives the same bits.
  const T* next = load<Sample>(stepped, block.offset, block.count, next_buffer);
  Sums sums;
  sums.log_prob = sum_of_scaled_squares(next, mean.values, c.inverse_sigma(), block.count);

  if (a.divergence == Divergence::none) return sums;
  const T* reference_m = load_output<Output>(a, c, a.reference_output, block, reference_buffer);
  if (a.divergence == Divergence::exact) {
    predict_means(c, x, reference_m, next_buffer.values, block.count);
    sums.distance = sum_of_scaled_squares(mean.values, next_buffer.values, c.inverse_sigma(), block.count);
  } else {
    sums.distance = sum_of_scaled_squares(m, reference_m, c.eps_from_output, block.count);
  }
  return sums;
}

template <class Sample, class Output, class T>
void forward_as(const Forward& a, int64_t threads) {
  const int64_t blocks_per_sample = (a.elements + kBlock - 1) / kBlock;
  std::vector<Sums> partial(a.batch * blocks_per_sample);
  parallel_for(a.batch * blocks_per_sample, kBlocksPerThread, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      partial[i] = forward_block<Sample, Output, T>(a, block_at(a, blocks_per_sample, i));
  });
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    Sums sums;
    for (int64_t i = sample * blocks_per_sample; i < (sample + 1) * blocks_per_sample; ++i) {
      sums.log_prob += partial[i].log_prob;
      sums.distance += partial[i].distance;
    }
    const Coefficients<T>& c = sampler_step::coefficients_of<T>(a, a.coefficients, sample);
    static_cast<T*>(a.log_prob)[sample] = log_prob(c, sums.log_prob, a.elements);
    if (a.divergence != Divergence::none)
      static_cast<T*>(a.distance)[sample] = distance(c, a.divergence, sums.distance, a.elements);
  }
}

template <class Sample, class Output, class T>
void backward_block(const Backward& a, const Block& block) {
  const Coefficients<T>& c = sampler_step::coefficients_of<T>(a, a.coefficients, block.sample);
  const BackwardWeights<T> weights = backward_weights(c, a, block.sample);
  Buffer<T> x_buffer, m_buffer, next_buffer, grad_next_buffer, grad_x, grad_m;
  const T* x = load<Sample>(a.sample, block.offset, block.count, x_buffer);
  const T* m = load_output<Output>(a, c, a.model_output, block, m_buffer);
  const T* next = load<Sample>(a.next, block.offset, block.count, next_buffer);
  const T* grad_next = grad_next_buffer.values;
  if (a.grad_next) {
    grad_next = load<Sample>(a.grad_next, block.offset, block.count, grad_next_buffer);
  } else {
    std::fill_n(grad_next_buffer.values, block.count, T(0));
  }
  element_gradients(c, weights, x, m, next, grad_next, grad_x.values, grad_m.values, block.count);

  if (a.divergence != Divergence::none && a.grad_distance) {
    const T* reference_m = load_output<Output>(a, c, a.reference_output, block, next_buffer);
    add_divergence_gradients(c, weights, a.divergence, x, m, reference_m, grad_x.values, grad_m.values, block.count);
  }
  if (a.grad_sample) store<Sample>(grad_x.values, a.grad_sample, block.offset, block.count);
  if (!a.grad_output) return;
  if (a.guided) {
    Buffer<T> negative, positive;
    unguide_all(c, grad_m.values, negative.values, positive.values, block.count);
    store<Output>(negative.values, a.grad_output, block.offset, block.count);
    store<Output>(positive.values, a.grad_output, block.offset + a.batch * a.elements, block.count);
  } else {
    store<Output>(grad_m.values, a.grad_output, block.offset, block.count);
  }
}

template <class Sample, class Output, class T>
void backward_as(const Backward& a, int64_t threads) {
  const int64_t blocks_per_sample = (a.elements + kBlock - 1) / kBlock;
  parallel_for(a.batch * blocks_per_sample, kBlocksPerThread, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      backward_block<Sample, Output, T>(a, block_at(a, blocks_per_sample, i));
  });
}

}  // namespace

void sampler_step_forward(const Forward& arguments, int64_t threads) {
  with_dtype(arguments.sample_dtype, [&](auto sample) {
    with_dtype(arguments.output_dtype, [&](auto output) {
      using Sample = decltype(sample);
      using Output = decltype(output);
      forward_as<Sample, Output, maths_type<Sample, Output>>(arguments, threads);
    });
  });
}

void sampler_step_backward(const Backward& arguments, int64_t threads) {
  with_dtype(arguments.sample_dtype, [&](auto sample) {
    with_dtype(arguments.output_dtype, [&](auto output) {
      using Sample = decltype(sample);
      using Output = decltype(output);
      backward_as<Sample, Output, maths_type<Sample, Output>>(arguments, threads);
    });
  });
}

}  // namespace rftcore::cpu
