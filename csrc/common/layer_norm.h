// The maths of y = (x - mean) inverse_deviation weight + bias over rows, and of its backward, and the arguments both
// devices take. The specification is layer_norm_reference in rftcore/ops/layer_norm.py.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "vector.h"

namespace rftcore::layer_norm {

struct Problem {
  int dtype;  // of x, y and their gradients
  int64_t rows, width;
  const void* x;
  Vector weight;  // (width,)
};

// mean, inverse_deviation: (rows,), in the maths type.
struct Forward : Problem {
  Vector bias;  // (width,)
  double eps;
  void *y, *mean, *inverse_deviation;
};

// Gradients are null where not needed, but grad_x.
struct Backward : Problem {
  const void *mean, *inverse_deviation, *grad_y;
  void* grad_x;
  Vector grad_weight, grad_bias;
};

template <class T>
struct Row {
  T mean, inverse_deviation;
};

template <class T>
RFTCORE_HOST_DEVICE T normalised(const Row<T>& row, T x) {
  return (x - row.mean) * row.inverse_deviation;
}

// Sums over a row, with g = weight grad_y and d = x - mean.
struct RowSums {
  double g = 0, gd = 0;

  RFTCORE_HOST_DEVICE void add(const RowSums& other) {
    g += other.g;
    gd += other.gd;
  }
};

// grad_x = inverse_deviation g + constant + slope d.
template <class T>
struct RowGradient {
  T constant, slope;
};

template <class T>
RFTCORE_HOST_DEVICE RowGradient<T> row_gradient(const Row<T>& row, const RowSums& sums, int64_t width) {
  const double inverse_deviation = row.inverse_deviation;
  const double factor = inverse_deviation / double(width > 0 ? width : 1);
  return {T(-factor * sums.g), T(-factor * sums.gd * inverse_deviation * inverse_deviation)};
}

}  // namespace rftcore::layer_norm
