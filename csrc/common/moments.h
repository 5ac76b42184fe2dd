// Mean and variance, merged from parts (Chan, Golub, LeVeque 1979): no difference of large squares.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace rftcore {

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: sum of squared distances from the mean

  RFTCORE_HOST_DEVICE void merge(const Moments& other) {
    const double total = count + other.count;
    if (total == 0) return;
    const double distance = other.mean - mean;
    squares += other.squares + distance * distance * (count * other.count / total);
    mean += distance * (other.count / total);
    count = total;
  }

  RFTCORE_HOST_DEVICE double inverse_deviation(double eps) const {
    return 1.0 / sqrt((count > 0 ? squares / count : 0.0) + eps);
  }
};

// Of `count` values, from the sums of their distances from `pilot` and of the squares of these. A pilot that is some k
// standard deviations away from the mean costs a factor of k^2 of the precision of `squares`.
RFTCORE_HOST_DEVICE Moments moments_about(double count, double pilot, double sum, double squares) {
  const double distance = sum / count;
  const double about_mean = squares - distance * sum;
  return {count, pilot + distance, about_mean < 0 ? 0 : about_mean};
}

// Of `parts` parts of `count` values each.
template <class T>
RFTCORE_HOST_DEVICE Moments moments_of_equal_parts(int64_t count, const T* means, const T* squares, int64_t parts) {
  double mean = 0, total = 0;
  for (int64_t i = 0; i < parts; ++i) mean += means[i];
  mean /= double(parts);
  for (int64_t i = 0; i < parts; ++i) {
    const double distance = means[i] - mean;
    total += squares[i] + double(count) * distance * distance;
  }
  return {double(count * parts), mean, total};
}

}  // namespace rftcore
