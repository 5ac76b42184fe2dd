// The maths of a sampler step and of its backward, one element at a time, and the arguments both devices take.
// The specification is sampler_step_reference in rftcore/ops/sampler_step.py; the order of the operations is the
// same, so that with no contraction to fused multiply-adds every device gives the same next sample, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "host_device.h"

namespace rftcore::sampler_step {

enum class Divergence : int { none = 0, exact = 1, uniform = 2 };

// A row of `coefficients`; the columns are those of Coefficient in rftcore/ops/sampler_step.py.
template <class T>
struct Coefficients {
  T x0_from_sample, x0_from_output, clip, mean_from_x0, mean_from_sample, mean_from_output, sigma, eps_from_output,
      guidance;

  // Where sigma is 0 the log-probability and the divergence are 0, whatever their terms are scaled by.
  RFTCORE_HOST_DEVICE T inverse_sigma() const { return sigma == T(0) ? T(1) : T(1) / sigma; }
};

struct Problem {
  int sample_dtype, output_dtype;
  int64_t batch, elements;  // elements of one sample
  double share;             // 1 / elements
  bool guided;              // the model output is [negative; positive]
  bool coefficients_per_sample;
  Divergence divergence;
};

// Pointers are null where a tensor is absent. All are contiguous.
struct Forward : Problem {
  const void *sample, *model_output, *coefficients, *noise, *next_given, *reference_output;
  void *next, *log_prob, *distance;
};

struct Backward : Problem {
  const void *sample, *model_output, *coefficients, *next, *reference_output;
  const void *grad_next, *grad_log_prob, *grad_distance;
  void *grad_sample, *grad_output;
};

template <class T>
RFTCORE_HOST_DEVICE const Coefficients<T>& coefficients_of(const Problem& problem, const void* table, int64_t sample) {
  return static_cast<const Coefficients<T>*>(table)[problem.coefficients_per_sample ? sample : 0];
}

template <class T>
RFTCORE_HOST_DEVICE T guide(const Coefficients<T>& c, T negative, T positive) {
  return negative + c.guidance * (positive - negative);
}

template <class T>
RFTCORE_HOST_DEVICE T predict_x0(const Coefficients<T>& c, T x, T m) {
  return c.x0_from_sample * x + c.x0_from_output * m;
}

// A NaN compares false and passes.
template <class T>
RFTCORE_HOST_DEVICE T clamp(T value, T bound) {
  const T raised = value < -bound ? -bound : value;
  return raised > bound ? bound : raised;
}

// torch.clamp's gradient: 1 inside and on the bounds.
template <class T>
RFTCORE_HOST_DEVICE T clamp_gradient(T value, T bound) {
  return value >= -bound && value <= bound ? T(1) : T(0);
}

template <class T>
RFTCORE_HOST_DEVICE T predict_mean(const Coefficients<T>& c, T x, T m) {
  return c.mean_from_x0 * clamp(predict_x0(c, x, m), c.clip) + c.mean_from_sample * x + c.mean_from_output * m;
}

template <class T>
RFTCORE_HOST_DEVICE T scaled_square(T a, T b, T scale) {
  const T scaled = (a - b) * scale;
  return scaled * scaled;
}

template <class T>
RFTCORE_HOST_DEVICE T log_prob(const Coefficients<T>& c, double sum_of_squares, int64_t elements) {
  if (c.sigma == T(0) || elements == 0) return T(0);
  const double half_log_two_pi = 0.91893853320467274178;
  return T(-0.5 * sum_of_squares / double(elements) - log(double(c.sigma)) - half_log_two_pi);
}

template <class T>
RFTCORE_HOST_DEVICE T distance(const Coefficients<T>& c, Divergence kind, double sum_of_squares, int64_t elements) {
  if (c.sigma == T(0) || elements == 0) return T(0);
  return T((kind == Divergence::exact ? 0.5 : 1.0) * sum_of_squares / double(elements));
}

// What the gradient of one sample's log-probability and divergence is worth to each of its elements.
template <class T>
struct BackwardWeights {
  T inverse_sigma, log_prob, distance;
};

template <class T>
RFTCORE_HOST_DEVICE BackwardWeights<T> backward_weights(const Coefficients<T>& c, const Backward& a, int64_t sample) {
  const T inverse_sigma = c.inverse_sigma();
  const auto weight = [&](const void* grad, T factor) {
    return grad && c.sigma != T(0) ? static_cast<const T*>(grad)[sample] * factor * T(a.share) : T(0);
  };
  return {inverse_sigma, weight(a.grad_log_prob, inverse_sigma),
          weight(a.grad_distance, a.divergence == Divergence::exact ? inverse_sigma
                                                                    : T(2) * c.eps_from_output * c.eps_from_output)};
}

template <class T>
struct ElementGradient {
  T sample, output;  // output: with respect to the guided m
};

// `next` is the rounded next sample, `grad_next` its gradient (0 where a given one was scored).
template <class T>
RFTCORE_HOST_DEVICE ElementGradient<T> element_gradient(const Coefficients<T>& c, const BackwardWeights<T>& weights,
                                                        T x, T m, T next, T grad_next) {
  const T x0 = predict_x0(c, x, m);
  const T grad_mean = grad_next + weights.log_prob * ((next - predict_mean(c, x, m)) * weights.inverse_sigma);
  const T grad_x0 = c.mean_from_x0 * grad_mean * clamp_gradient(x0, c.clip);
  return {c.mean_from_sample * grad_mean + c.x0_from_sample * grad_x0,
          c.mean_from_output * grad_mean + c.x0_from_output * grad_x0};
}

// What the divergence from the reference's output adds. "exact" is ((mean - mean_reference) / sigma)^2 / 2, and x
// enters both means: its linear terms cancel, what is left of x is where only one of the two is clamped.
template <class T>
RFTCORE_HOST_DEVICE ElementGradient<T> divergence_gradient(const Coefficients<T>& c, const BackwardWeights<T>& weights,
                                                           Divergence kind, T x, T m, T reference_m) {
  if (kind == Divergence::uniform) return {T(0), weights.distance * (m - reference_m)};
  const T grad_mean =
      weights.distance * ((predict_mean(c, x, m) - predict_mean(c, x, reference_m)) * weights.inverse_sigma);
  const T passes = clamp_gradient(predict_x0(c, x, m), c.clip);
  const T reference_passes = clamp_gradient(predict_x0(c, x, reference_m), c.clip);
  const T grad_x0 = c.mean_from_x0 * grad_mean;
  return {c.x0_from_sample * grad_x0 * (passes - reference_passes),
          c.mean_from_output * grad_mean + c.x0_from_output * grad_x0 * passes};
}

}  // namespace rftcore::sampler_step
