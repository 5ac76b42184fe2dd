// The loops over elements of group_norm_silu on the CPU. Each works on a strip of a matrix, whose columns are channels or
// all one channel, a few rows at a time: their number is a constant, and the loop over columns is vectorised.
#pragma once

#include <type_traits>

#include "../common/moments.h"
#include "simd.h"
#include "strip.h"

namespace rftcore::cpu::group_norm_silu_loops {

using namespace group_norm_silu;

// The positions of a channel are folded into rows of so many, and a strip is at most so high: 16 KiB of fp32.
constexpr int64_t kFold = 64, kFoldedRows = 64;
// No strip is wider: its sums and its channels' constants stay in the first-level cache.
constexpr int64_t kColumns = 512;
// So many rows are added before a sum in memory is touched.
constexpr int64_t kRowsAtOnce = 4;

// What a loop asks for by column is a pointer to a value per column, or one value that all columns share.
template <class T>
struct Shared {
  T value;

  RFTCORE_HOST_DEVICE T operator[](int64_t) const { return value; }
};

template <class Values>
struct Channels {
  Values center, gain, offset;

  RFTCORE_HOST_DEVICE auto operator[](int64_t column) const {
    return Channel<std::decay_t<decltype(center[0])>>{center[column], gain[column], offset[column]};
  }
};

// grad_x is gain g + constant + slope d.
template <class Values>
struct Gradients {
  Values constant, slope;
};

// Pairwise: a chain of additions would take as long as the loops below.
template <int64_t Width, class T>
RFTCORE_HOST_DEVICE T total(T* lanes) {
  if constexpr (Width > 1) {
    for (int64_t lane = 0; lane < Width / 2; ++lane) lanes[lane] += lanes[lane + Width / 2];
    return total<Width / 2>(lanes);
  } else {
    return lanes[0];
  }
}

template <int64_t Rows, class Stored, class T>
RFTCORE_HOST_DEVICE void add_values_of_rows(const Stored* x, int64_t stride, int64_t width, T* __restrict sums) {
  for (int64_t column = 0; column < width; ++column) {
    T sum = 0;
    for (int64_t row = 0; row < Rows; ++row) sum += convert<T>(x[row * stride + column]);
    sums[column] += sum;
  }
}

template <class Stored, class T>
RFTCORE_HOST_DEVICE void add_values(const Stored* x, int64_t rows, int64_t stride, int64_t width, T* __restrict sums) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce)
    add_values_of_rows<kRowsAtOnce>(x + row * stride, stride, width, sums);
  for (; row < rows; ++row) add_values_of_rows<1>(x + row * stride, stride, width, sums);
}

template <int64_t Rows, class Stored, class Values, class T>
RFTCORE_HOST_DEVICE void add_distances_of_rows(const Stored* x, int64_t stride, int64_t width, Values pilot,
                                               T* __restrict sums, T* __restrict squares) {
  for (int64_t column = 0; column < width; ++column) {
    T sum = 0, square = 0;
    for (int64_t row = 0; row < Rows; ++row) {
      const T distance = convert<T>(x[row * stride + column]) - pilot[column];
      sum += distance;
      square += distance * distance;
    }
    sums[column] += sum;
    squares[column] += square;
  }
}

template <class Stored, class Values, class T>
RFTCORE_HOST_DEVICE void add_distances(const Stored* x, int64_t rows, int64_t stride, int64_t width, Values pilot,
                                       T* __restrict sums, T* __restrict squares) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce)
    add_distances_of_rows<kRowsAtOnce>(x + row * stride, stride, width, pilot, sums, squares);
  for (; row < rows; ++row) add_distances_of_rows<1>(x + row * stride, stride, width, pilot, sums, squares);
}

// Distances are taken from a pilot, the mean of a strip's first rows. These are part of the strip, so that the pilot is
// at most sqrt(kPilotShare) of its standard deviations away from its mean, and one pass over all of it suffices.
constexpr int64_t kPilotShare = 16;

RFTCORE_HOST_DEVICE int64_t pilot_rows(int64_t rows) { return (rows + kPilotShare - 1) / kPilotShare; }

// Of a strip all of whose columns are one channel. `Full` makes its width a constant.
template <bool Full, class T, class Stored>
RFTCORE_SIMD Moments channel_moments(const Stored* x, Strip strip) {
  const int64_t width = Full ? kFold : strip.width;
  T pilots[kFold] = {}, sums[kFold] = {}, squares[kFold] = {};
  add_values(x, pilot_rows(strip.rows), kFold, width, pilots);
  const T pilot = total<kFold>(pilots) / T(pilot_rows(strip.rows) * width);
  add_distances(x, strip.rows, kFold, width, Shared<T>{pilot}, sums, squares);
  return moments_about(double(strip.rows * width), pilot, total<kFold>(sums), total<kFold>(squares));
}

// Of a strip whose columns are channels, column by column.
template <class T, class Stored>
RFTCORE_SIMD void column_moments(const Stored* x, Strip strip, double* __restrict means, double* __restrict squares) {
  T pilots[kColumns] = {}, sums[kColumns] = {}, sums_of_squares[kColumns] = {};
  add_values(x, pilot_rows(strip.rows), strip.stride, strip.width, pilots);
  for (int64_t column = 0; column < strip.width; ++column) pilots[column] /= T(pilot_rows(strip.rows));
  add_distances(x, strip.rows, strip.stride, strip.width, static_cast<const T*>(pilots), sums, sums_of_squares);
  for (int64_t column = 0; column < strip.width; ++column) {
    const Moments moments =
        moments_about(double(strip.rows), pilots[column], sums[column], sums_of_squares[column]);
    means[column] = moments.mean;
    squares[column] = moments.squares;
  }
}

template <bool silu_follows, class Stored, class Values>
RFTCORE_SIMD void write_output(const Stored* x, Strip strip, Channels<Values> channels, Stored* __restrict y) {
  using T = maths_type<Stored, Stored>;
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t column = 0; column < strip.width; ++column) {
      const int64_t i = row * strip.stride + column;
      y[i] = convert<Stored>(output<silu_follows>(channels[column], convert<T>(x[i])));
    }
}

// Where memory holds the maths type, g is kept in grad_x and not computed again: SiLU' is most of the work.
template <class Stored, class T>
constexpr bool kKeepsG = std::is_same_v<Stored, T>;

template <int64_t Rows, bool silu_follows, class Stored, class Values, class T>
RFTCORE_HOST_DEVICE void add_sums_of_rows(const Stored* x, const Stored* grad_y, int64_t stride, int64_t width,
                                          Channels<Values> channels, T* __restrict sums_g, T* __restrict sums_gd,
                                          T* __restrict sums_d, Stored* __restrict grad_x) {
  for (int64_t column = 0; column < width; ++column) {
    const Channel<T> channel = channels[column];
    T sum_g = 0, sum_gd = 0, sum_d = 0;
    for (int64_t row = 0; row < Rows; ++row) {
      const int64_t i = row * stride + column;
      const T value = convert<T>(x[i]);
      const T d = value - channel.center;
      const T g = affined_gradient<silu_follows>(channel, value, convert<T>(grad_y[i]));
      if constexpr (kKeepsG<Stored, T>) grad_x[i] = g;
      sum_g += g;
      sum_gd += g * d;
      sum_d += d;
    }
    sums_g[column] += sum_g;
    sums_gd[column] += sum_gd;
    sums_d[column] += sum_d;
  }
}

// Of a strip all of whose columns are one channel. `Full` makes its width a constant.
template <bool Full, bool silu_follows, class Stored, class T>
RFTCORE_SIMD ChannelSums channel_sums(const Stored* x, const Stored* grad_y, Strip strip, Channels<Shared<T>> channel,
                                      Stored* __restrict grad_x) {
  const int64_t width = Full ? kFold : strip.width;
  T g[kFold] = {}, gd[kFold] = {}, d[kFold] = {};
  int64_t row = 0;
  for (; row + kRowsAtOnce <= strip.rows; row += kRowsAtOnce)
    add_sums_of_rows<kRowsAtOnce, silu_follows>(x + row * kFold, grad_y + row * kFold, kFold, width, channel, g, gd, d,
                                                grad_x + row * kFold);
  for (; row < strip.rows; ++row)
    add_sums_of_rows<1, silu_follows>(x + row * kFold, grad_y + row * kFold, kFold, width, channel, g, gd, d,
                                      grad_x + row * kFold);
  return {total<kFold>(g), total<kFold>(gd), total<kFold>(d)};
}

// Of a strip whose columns are channels, added to `sums` column by column.
template <bool silu_follows, class Stored, class T>
RFTCORE_SIMD void add_column_sums(const Stored* x, const Stored* grad_y, Strip strip, Channels<const T*> channels,
                                  ChannelSums* __restrict sums, Stored* __restrict grad_x) {
  T g[kColumns] = {}, gd[kColumns] = {}, d[kColumns] = {};
  // Row by row: of (2, 320, 64, 64), four rows at once of three tensors took 1.2 times as long, on an EPYC.
  for (int64_t row = 0; row < strip.rows; ++row) {
    const int64_t i = row * strip.stride;
    add_sums_of_rows<1, silu_follows>(x + i, grad_y + i, strip.stride, strip.width, channels, g, gd, d, grad_x + i);
  }
  for (int64_t column = 0; column < strip.width; ++column) sums[column].add({g[column], gd[column], d[column]});
}

template <bool silu_follows, class Stored, class Values>
RFTCORE_SIMD void write_gradient(const Stored* x, const Stored* grad_y, Strip strip, Channels<Values> channels,
                                 Gradients<Values> gradients, Stored* __restrict grad_x) {
  using T = maths_type<Stored, Stored>;
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t column = 0; column < strip.width; ++column) {
      const int64_t i = row * strip.stride + column;
      const Channel<T> channel = channels[column];
      const T value = convert<T>(x[i]);
      const T d = value - channel.center;
      T g;
      if constexpr (kKeepsG<Stored, T>)
        g = grad_x[i];
      else
        g = affined_gradient<silu_follows>(channel, value, convert<T>(grad_y[i]));
      // gain is weight (1 + scale) inverse_deviation: what g is worth to grad_x.
      grad_x[i] = convert<Stored>(channel.gain * g + gradients.constant[column] + gradients.slope[column] * d);
    }
}

}  // namespace rftcore::cpu::group_norm_silu_loops
