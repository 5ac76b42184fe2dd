// layer_norm on the CPU, row by row: a row is still in the first-level cache when it is read again. Gradients of weight
// and bias are summed per block of rows and added in an order that does not depend on the number of threads.
#include "layer_norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "strip.h"

namespace rftcore::cpu {

using namespace layer_norm;

namespace {

constexpr int64_t kBlockRows = 64;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kElementsPerThread = 131072;

// Pairwise: a chain of additions takes as long as the rest of a short row.
template <class T>
RFTCORE_HOST_DEVICE T total(T (&lanes)[kLanes]) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// In the next three `Full` makes the number of lanes a constant, and the lanes vectors.

template <bool Full, class T, class Stored>
RFTCORE_SIMD T sum(const Stored* x, Strip strip) {
  const int64_t width = Full ? kLanes : strip.width;
  T lanes[kLanes] = {};
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += convert<T>(x[row * strip.stride + lane]);
  return total(lanes);
}

template <bool Full, class T, class Stored>
RFTCORE_SIMD T squared_distances(const Stored* x, Strip strip, T mean) {
  const int64_t width = Full ? kLanes : strip.width;
  T lanes[kLanes] = {};
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const T distance = convert<T>(x[row * strip.stride + lane]) - mean;
      lanes[lane] += distance * distance;
    }
  return total(lanes);
}

template <bool Full, class T, class Stored>
RFTCORE_SIMD RowSums gradient_sums(const Stored* x, const Stored* grad_y, const T* weight, Strip strip, T mean) {
  const int64_t width = Full ? kLanes : strip.width;
  T g_lanes[kLanes] = {}, gd_lanes[kLanes] = {};
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t i = row * strip.stride + lane;
      const T g = convert<T>(grad_y[i]) * weight[i];
      g_lanes[lane] += g;
      gd_lanes[lane] += g * (convert<T>(x[i]) - mean);
    }
  return {double(total(g_lanes)), double(total(gd_lanes))};
}

template <class Stored, class T>
RFTCORE_SIMD void write_output(const Stored* x, Row<T> row, const T* weight, const T* bias, int64_t width,
                               Stored* __restrict y) {
  for (int64_t i = 0; i < width; ++i)
    y[i] = convert<Stored>(normalised(row, convert<T>(x[i])) * weight[i] + bias[i]);
}

template <class Stored, class T>
RFTCORE_SIMD void write_gradient(const Stored* x, const Stored* grad_y, Row<T> row, const T* weight,
                                 RowGradient<T> gradient, int64_t width, Stored* __restrict grad_x) {
  for (int64_t i = 0; i < width; ++i)
    grad_x[i] = convert<Stored>(row.inverse_deviation * (convert<T>(grad_y[i]) * weight[i]) + gradient.constant +
                                gradient.slope * (convert<T>(x[i]) - row.mean));
}

template <class Stored, class T>
RFTCORE_SIMD void add_affine_gradients(const Stored* x, const Stored* grad_y, Row<T> row, int64_t width,
                                       T* __restrict grad_weight, T* __restrict grad_bias) {
  for (int64_t i = 0; i < width; ++i) {
    const T grad = convert<T>(grad_y[i]);
    grad_weight[i] += grad * normalised(row, convert<T>(x[i]));
    grad_bias[i] += grad;
  }
}

// In the maths type, so that no loop over elements asks for a dtype.
template <class T>
std::vector<T> values_of(const Vector& vector, int64_t width, T if_absent) {
  std::vector<T> values(width);
  for (int64_t i = 0; i < width; ++i) values[i] = vector.get(i, if_absent);
  return values;
}

// Calls function(full, strip) on the strips of a row, with `full` a constant.
template <class Function>
void cut_row(int64_t width, const Function& function) {
  cut_line(0, width, [&](const Strip& strip) {
    strip.width == kLanes ? function(std::true_type{}, strip) : function(std::false_type{}, strip);
  });
}

template <class Stored, class T>
Row<T> row_statistics(const Stored* x, int64_t width, double eps) {
  const double share = 1.0 / double(std::max<int64_t>(1, width));
  double values = 0, squares = 0;
  cut_row(width, [&](auto full, const Strip& strip) { values += sum<full(), T>(x + strip.offset, strip); });
  const T mean = T(values * share);
  cut_row(width, [&](auto full, const Strip& strip) {
    squares += squared_distances<full(), T>(x + strip.offset, strip, mean);
  });
  return {mean, T(1.0 / std::sqrt(squares * share + eps))};
}

template <class Stored, class T>
RowSums row_sums(const Stored* x, const Stored* grad_y, const T* weight, T mean, int64_t width) {
  RowSums sums;
  cut_row(width, [&](auto full, const Strip& strip) {
    sums.add(gradient_sums<full(), T>(x + strip.offset, grad_y + strip.offset, weight + strip.offset, strip, mean));
  });
  return sums;
}

int64_t count_blocks(const Problem& p) { return (p.rows + kBlockRows - 1) / kBlockRows; }

// Calls function(row, block) for every row.
template <class Function>
void for_rows(const Problem& p, int64_t threads, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (kBlockRows * std::max<int64_t>(1, p.width)));
  parallel_for(count_blocks(p), grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlockRows; row < std::min(p.rows, end * kBlockRows); ++row)
      function(row, row / kBlockRows);
  });
}

template <class Stored, class T>
void forward_as(const Forward& a, int64_t threads) {
  const std::vector<T> weight = values_of(a.weight, a.width, T(1)), bias = values_of(a.bias, a.width, T(0));
  for_rows(a, threads, [&](int64_t index, int64_t) {
    const Stored* x = static_cast<const Stored*>(a.x) + index * a.width;
    const Row<T> row = row_statistics<Stored, T>(x, a.width, a.eps);
    static_cast<T*>(a.mean)[index] = row.mean;
    static_cast<T*>(a.inverse_deviation)[index] = row.inverse_deviation;
    write_output(x, row, weight.data(), bias.data(), a.width, static_cast<Stored*>(a.y) + index * a.width);
  });
}

template <class Stored, class T>
void backward_as(const Backward& a, int64_t threads) {
  const bool affine = a.grad_weight || a.grad_bias;
  const int64_t blocks = affine ? count_blocks(a) : 0;
  const std::vector<T> weight = values_of(a.weight, a.width, T(1));
  std::vector<T> grad_weight(blocks * a.width), grad_bias(blocks * a.width);
  for_rows(a, threads, [&](int64_t index, int64_t block) {
    const Stored* x = static_cast<const Stored*>(a.x) + index * a.width;
    const Stored* grad_y = static_cast<const Stored*>(a.grad_y) + index * a.width;
    const Row<T> row = {static_cast<const T*>(a.mean)[index], static_cast<const T*>(a.inverse_deviation)[index]};
    const RowSums sums = row_sums(x, grad_y, weight.data(), row.mean, a.width);
    write_gradient(x, grad_y, row, weight.data(), row_gradient(row, sums, a.width), a.width,
                   static_cast<Stored*>(a.grad_x) + index * a.width);
    if (affine)
      add_affine_gradients(x, grad_y, row, a.width, grad_weight.data() + block * a.width,
                           grad_bias.data() + block * a.width);
  });
  for (int64_t i = 0; affine && i < a.width; ++i) {
    double sum_weight = 0, sum_bias = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      sum_weight += grad_weight[block * a.width + i];
      sum_bias += grad_bias[block * a.width + i];
    }
    if (a.grad_weight) a.grad_weight.set(i, sum_weight);
    if (a.grad_bias) a.grad_bias.set(i, sum_bias);
  }
}

}  // namespace

void layer_norm_forward(const Forward& arguments, int64_t threads) {
  with_dtype(arguments.dtype, [&](auto stored) {
    forward_as<decltype(stored), maths_type<decltype(stored), decltype(stored)>>(arguments, threads);
  });
}

void layer_norm_backward(const Backward& arguments, int64_t threads) {
  with_dtype(arguments.dtype, [&](auto stored) {
    backward_as<decltype(stored), maths_type<decltype(stored), decltype(stored)>>(arguments, threads);
  });
}

}  // namespace rftcore::cpu
