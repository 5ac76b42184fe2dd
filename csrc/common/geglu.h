// The maths of y = u1 * gelu(u2), u = [u1, u2], with the exact gelu(x) = x cdf(x), and of its backward, and the
// arguments both devices take. The specification is geglu_reference in rftcore/ops/geglu.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "host_device.h"

namespace rftcore::geglu {

// u: (rows, 2 width); y: (rows, width).
struct Problem {
  int dtype;
  int64_t rows, width;
};

struct Forward : Problem {
  const void* u;
  void* y;
};

struct Backward : Problem {
  const void *u, *grad_y;
  void* grad_u;
};

// Of the standard normal distribution at x.
template <class T>
struct Normal {
  T cdf, density;
};

// cdf(-t) = exp(-t^2 / 2) R(t) for t >= 0, with R a polynomial in 1 / (1 + 0.34 t), fitted in the minimax sense on
// [0, 14] to 1.1e-8: the tail keeps its relative precision, and one exponential serves cdf and density.
RFTCORE_HOST_DEVICE Normal<float> normal(float x) {
  const float t = x < 0.0f ? -x : x;
  const float bell = exponential(-0.5f * x * x);
  const float w = 1.0f / (1.0f + 0.34f * t);
  float r = -0.0274298635f;
  r = r * w + 0.145546989f;
  r = r * w - 0.284924055f;
  r = r * w + 0.214808814f;
  r = r * w - 0.0528030439f;
  r = r * w + 0.11851303f;
  r = r * w + 0.114469596f;
  r = r * w + 0.136202631f;
  r = r * w + 0.135615897f;
  const float tail = bell * (r * w);
  return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * bell};
}

RFTCORE_HOST_DEVICE Normal<double> normal(double x) {
  return {0.5 * erfc(-0.70710678118654752440 * x), 0.39894228040143267794 * exp(-0.5 * x * x)};
}

template <class T>
RFTCORE_HOST_DEVICE T output(T u1, T u2) {
  return u1 * (u2 * normal(u2).cdf);
}

template <class T>
struct Gradient {
  T u1, u2;
};

template <class T>
RFTCORE_HOST_DEVICE Gradient<T> gradient(T u1, T u2, T grad_y) {
  const Normal<T> at = normal(u2);
  return {grad_y * (u2 * at.cdf), grad_y * u1 * (at.cdf + u2 * at.density)};
}

}  // namespace rftcore::geglu
