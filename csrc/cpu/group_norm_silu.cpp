// group_norm_silu on the CPU. Both memory formats are cut into strips in which a lane holds one channel, and one set of
// vector loops serves both. Where a channel's positions are neighbours, a thread takes a whole group, whose values are
// still in its cache when they are read again; where channels are neighbours, it takes tiles of positions. Sums are
// taken per strip and added in an order that does not depend on the number of threads.
#include "group_norm_silu.h"

#include <algorithm>
#include <vector>

#include "../common/moments.h"
#include "parallel.h"
#include "simd.h"
#include "strip.h"

namespace rftcore::cpu {

using namespace group_norm_silu;

namespace {

// A tile of so many positions is still in the second-level cache when it is read again, and pays for its lanes.
constexpr int64_t kTilePositions = 128;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kElementsPerThread = 131072;

// The channels of a strip's lanes.
template <class T>
struct Lanes {
  T center[kLanes], gain[kLanes], offset[kLanes];

  RFTCORE_HOST_DEVICE Channel<T> operator[](int64_t lane) const { return {center[lane], gain[lane], offset[lane]}; }
};

// grad_x of a strip's lanes is factor g + constant + slope d.
template <class T>
struct GradientLanes {
  T factor[kLanes], constant[kLanes], slope[kLanes];
};

template <class T>
struct LaneMoments {
  T mean[kLanes], squares[kLanes];
};

template <class T>
struct LaneSums {
  T g[kLanes], gd[kLanes], d[kLanes];
};

// In the loops below `Full` makes the number of lanes a constant, and the lanes vectors.

template <bool Full, class Stored, class T>
RFTCORE_SIMD void take_moments(const Stored* x, Strip strip, LaneMoments<T>& moments) {
  const int64_t width = Full ? kLanes : strip.width;
  T sum[kLanes] = {}, squares[kLanes] = {};
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) sum[lane] += convert<T>(x[row * strip.stride + lane]);
  const T share = T(1) / T(strip.rows);
  for (int64_t lane = 0; lane < width; ++lane) sum[lane] *= share;
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const T distance = convert<T>(x[row * strip.stride + lane]) - sum[lane];
      squares[lane] += distance * distance;
    }
  for (int64_t lane = 0; lane < width; ++lane) moments.mean[lane] = sum[lane];
  for (int64_t lane = 0; lane < width; ++lane) moments.squares[lane] = squares[lane];
}

template <bool Full, bool silu_follows, class Stored, class T>
RFTCORE_SIMD void write_output(const Stored* x, Strip strip, const Lanes<T>& lanes, Stored* __restrict y) {
  const int64_t width = Full ? kLanes : strip.width;
  const Lanes<T> held = lanes;
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t i = row * strip.stride + lane;
      y[i] = convert<Stored>(output<silu_follows>(held[lane], convert<T>(x[i])));
    }
}

// Where memory holds the maths type, g is kept in grad_x and not computed again: SiLU' is most of the work.
template <class Stored, class T>
constexpr bool kKeepsG = std::is_same_v<Stored, T>;

template <bool Full, bool silu_follows, class Stored, class T>
RFTCORE_SIMD void take_sums(const Stored* x, const Stored* grad_y, Strip strip, const Lanes<T>& lanes,
                            LaneSums<T>& sums, Stored* __restrict grad_x) {
  const int64_t width = Full ? kLanes : strip.width;
  const Lanes<T> held = lanes;
  LaneSums<T> sum = {};
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t i = row * strip.stride + lane;
      const T value = convert<T>(x[i]);
      const T d = value - held.center[lane];
      const T g = affined_gradient<silu_follows>(held[lane], value, convert<T>(grad_y[i]));
      if constexpr (kKeepsG<Stored, T>) grad_x[i] = g;
      sum.g[lane] += g;
      sum.gd[lane] += g * d;
      sum.d[lane] += d;
    }
  sums = sum;
}

template <bool Full, bool silu_follows, class Stored, class T>
RFTCORE_SIMD void write_gradient(const Stored* x, const Stored* grad_y, Strip strip, const Lanes<T>& lanes,
                                 const GradientLanes<T>& gradient, Stored* __restrict grad_x) {
  const int64_t width = Full ? kLanes : strip.width;
  const Lanes<T> held = lanes;
  const GradientLanes<T> grad = gradient;
  for (int64_t row = 0; row < strip.rows; ++row)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t i = row * strip.stride + lane;
      const T value = convert<T>(x[i]);
      const T d = value - held.center[lane];
      T g;
      if constexpr (kKeepsG<Stored, T>)
        g = grad_x[i];
      else
        g = affined_gradient<silu_follows>(held[lane], value, convert<T>(grad_y[i]));
      grad_x[i] = convert<Stored>(grad.factor[lane] * g + grad.constant[lane] + grad.slope[lane] * d);
    }
}

// What one thread takes at a time: a group of one sample, or where channels are neighbours some of its positions.
struct Piece {
  int64_t sample, first_channel, channels, first_position, positions;
};

int64_t pieces_per_sample(const Problem& p) {
  return p.channels_last ? (p.positions + kTilePositions - 1) / kTilePositions : p.groups;
}

Piece piece_at(const Problem& p, int64_t index) {
  const int64_t sample = index / pieces_per_sample(p), part = index % pieces_per_sample(p);
  if (!p.channels_last) return {sample, part * p.channels_per_group(), p.channels_per_group(), 0, p.positions};
  const int64_t first = part * kTilePositions;
  return {sample, 0, p.channels, first, std::min(kTilePositions, p.positions - first)};
}

template <class Function>
void for_pieces(const Problem& p, int64_t threads, const Function& function) {
  const int64_t count = p.batch * pieces_per_sample(p);
  if (count == 0) return;
  const int64_t elements = std::max<int64_t>(1, p.channels * p.positions / pieces_per_sample(p));
  parallel_for(count, std::max<int64_t>(1, kElementsPerThread / elements), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i, piece_at(p, i));
  });
}

// Calls function(strip, channel, step) on strips that cover the piece; lane i holds channel + i * step.
template <class Function>
void cut(const Problem& p, const Piece& piece, const Function& function) {
  if (p.channels_last) {
    cut_matrix((piece.sample * p.positions + piece.first_position) * p.channels, piece.positions, p.channels,
               [&](const Strip& strip, int64_t channel) { function(strip, channel, 1); });
    return;
  }
  for (int64_t c = piece.first_channel; c < piece.first_channel + piece.channels; ++c)
    cut_line((piece.sample * p.channels + c) * p.positions, p.positions,
             [&](const Strip& strip) { function(strip, c, 0); });
}

// Calls function(full, silu_follows) with constants for what the loops take as template arguments.
template <class Function>
void with_loop(const Problem& p, const Strip& strip, const Function& function) {
  const auto with_width = [&](auto full) {
    p.silu ? function(full, std::true_type{}) : function(full, std::false_type{});
  };
  strip.width == kLanes ? with_width(std::true_type{}) : with_width(std::false_type{});
}

// Adds a piece's values to the moments of its sample's groups.
template <class Stored, class T>
void add_moments(const Problem& p, const Piece& piece, Moments* groups) {
  const Stored* x = static_cast<const Stored*>(p.x);
  cut(p, piece, [&](const Strip& strip, int64_t channel, int64_t step) {
    LaneMoments<T> lanes;
    if (strip.width == kLanes)
      take_moments<true>(x + strip.offset, strip, lanes);
    else
      take_moments<false>(x + strip.offset, strip, lanes);
    for (int64_t lane = 0; p.channel_bias && lane < strip.width; ++lane)
      lanes.mean[lane] += p.channel_bias.get(piece.sample * p.channels + channel + lane * step, T(0));
    for (int64_t lane = 0; lane < strip.width;) {
      const int64_t group = (channel + lane * step) / p.channels_per_group();
      const int64_t last = step ? std::min(strip.width, (group + 1) * p.channels_per_group() - channel) : strip.width;
      groups[group].merge(moments_of_equal_parts(strip.rows, lanes.mean + lane, lanes.squares + lane, last - lane));
      lane = last;
    }
  });
}

template <class T>
Lanes<T> lanes_at(const Problem& p, const void* mean, const void* inverse_deviation, int64_t sample, int64_t channel,
                  int64_t step, int64_t width) {
  Lanes<T> lanes = {};
  Channel<T> at = channel_at<T>(p, mean, inverse_deviation, sample, channel);
  for (int64_t lane = 0; lane < width; ++lane) {
    if (lane * step > 0) at = channel_at<T>(p, mean, inverse_deviation, sample, channel + lane);
    lanes.center[lane] = at.center;
    lanes.gain[lane] = at.gain;
    lanes.offset[lane] = at.offset;
  }
  return lanes;
}

template <class Stored, class T>
void write_piece(const Forward& a, const Piece& piece) {
  cut(a, piece, [&](const Strip& strip, int64_t channel, int64_t step) {
    const auto lanes = lanes_at<T>(a, a.mean, a.inverse_deviation, piece.sample, channel, step, strip.width);
    with_loop(a, strip, [&](auto full, auto silu_follows) {
      write_output<full(), silu_follows()>(static_cast<const Stored*>(a.x) + strip.offset, strip, lanes,
                                           static_cast<Stored*>(a.y) + strip.offset);
    });
  });
}

template <class Stored, class T>
void forward_as(const Forward& a, int64_t threads) {
  std::vector<Moments> moments(a.batch * a.groups);
  const auto finish = [&](int64_t group) {
    static_cast<T*>(a.mean)[group] = T(moments[group].mean);
    static_cast<T*>(a.inverse_deviation)[group] = T(moments[group].inverse_deviation(a.eps));
  };
  if (!a.channels_last) {
    for_pieces(a, threads, [&](int64_t group, const Piece& piece) {
      add_moments<Stored, T>(a, piece, &moments[piece.sample * a.groups]);
      finish(group);
      write_piece<Stored, T>(a, piece);
    });
    return;
  }
  const int64_t pieces = pieces_per_sample(a);
  std::vector<Moments> partial(a.batch * pieces * a.groups);
  for_pieces(a, threads, [&](int64_t index, const Piece& piece) {
    add_moments<Stored, T>(a, piece, &partial[index * a.groups]);
  });
  for (int64_t index = 0; index < a.batch * pieces; ++index)
    for (int64_t group = 0; group < a.groups; ++group)
      moments[index / pieces * a.groups + group].merge(partial[index * a.groups + group]);
  for (int64_t group = 0; group < a.batch * a.groups; ++group) finish(group);
  for_pieces(a, threads, [&](int64_t, const Piece& piece) { write_piece<Stored, T>(a, piece); });
}

// Adds a piece's values to the sums of its sample's channels.
template <class Stored, class T>
void add_sums(const Backward& a, const Piece& piece, ChannelSums* channels) {
  cut(a, piece, [&](const Strip& strip, int64_t channel, int64_t step) {
    const auto lanes = lanes_at<T>(a, a.mean, a.inverse_deviation, piece.sample, channel, step, strip.width);
    LaneSums<T> sums;
    with_loop(a, strip, [&](auto full, auto silu_follows) {
      take_sums<full(), silu_follows()>(static_cast<const Stored*>(a.x) + strip.offset,
                                        static_cast<const Stored*>(a.grad_y) + strip.offset, strip, lanes, sums,
                                        static_cast<Stored*>(a.grad_x) + strip.offset);
    });
    for (int64_t lane = 0; lane < strip.width; ++lane)
      channels[channel + lane * step].add({sums.g[lane], sums.gd[lane], sums.d[lane]});
  });
}

// `groups` are those of the piece's sample.
template <class Stored, class T>
void write_gradient_of_piece(const Backward& a, const Piece& piece, const GroupGradient* groups) {
  cut(a, piece, [&](const Strip& strip, int64_t channel, int64_t step) {
    const auto lanes = lanes_at<T>(a, a.mean, a.inverse_deviation, piece.sample, channel, step, strip.width);
    GradientLanes<T> gradient = {};
    for (int64_t lane = 0; lane < strip.width; ++lane) {
      const GroupGradient& group = groups[(channel + lane * step) / a.channels_per_group()];
      // gain is weight (1 + scale) inverse_deviation: what g is worth to grad_x.
      gradient.factor[lane] = lanes.gain[lane];
      gradient.constant[lane] = T(group.constant);
      gradient.slope[lane] = T(group.slope);
    }
    with_loop(a, strip, [&](auto full, auto silu_follows) {
      write_gradient<full(), silu_follows()>(static_cast<const Stored*>(a.x) + strip.offset,
                                             static_cast<const Stored*>(a.grad_y) + strip.offset, strip, lanes,
                                             gradient, static_cast<Stored*>(a.grad_x) + strip.offset);
    });
  });
}

template <class Stored, class T>
void backward_as(const Backward& a, int64_t threads) {
  std::vector<ChannelSums> sums(a.batch * a.channels);
  std::vector<GroupGradient> groups(a.batch * a.groups);
  const auto finish = [&](int64_t sample, int64_t group) {
    GroupGradient& gradient = groups[sample * a.groups + group];
    gradient = group_gradient<T>(a, &sums[sample * a.channels], sample, group);
    for (int64_t c = group * a.channels_per_group(); c < (group + 1) * a.channels_per_group(); ++c)
      modulation_gradients<T>(a, sums[sample * a.channels + c], gradient, sample, c);
  };
  const auto write = [&](const Piece& piece) {
    write_gradient_of_piece<Stored, T>(a, piece, &groups[piece.sample * a.groups]);
  };
  if (!a.channels_last) {
    for_pieces(a, threads, [&](int64_t index, const Piece& piece) {
      add_sums<Stored, T>(a, piece, &sums[piece.sample * a.channels]);
      finish(piece.sample, index % a.groups);
      write(piece);
    });
  } else {
    const int64_t pieces = pieces_per_sample(a);
    std::vector<ChannelSums> partial(a.batch * pieces * a.channels);
    for_pieces(a, threads, [&](int64_t index, const Piece& piece) {
      add_sums<Stored, T>(a, piece, &partial[index * a.channels]);
    });
    for (int64_t index = 0; index < a.batch * pieces; ++index)
      for (int64_t c = 0; c < a.channels; ++c)
        sums[index / pieces * a.channels + c].add(partial[index * a.channels + c]);
    for (int64_t group = 0; group < a.batch * a.groups; ++group) finish(group / a.groups, group % a.groups);
    for_pieces(a, threads, [&](int64_t, const Piece& piece) { write(piece); });
  }
  if (a.grad_weight || a.grad_bias)
    for (int64_t c = 0; c < a.channels; ++c) affine_gradients<T>(a, sums.data(), c);
}

}  // namespace

void group_norm_silu_forward(const Forward& arguments, int64_t threads) {
  with_dtype(arguments.dtype, [&](auto stored) {
    forward_as<decltype(stored), maths_type<decltype(stored), decltype(stored)>>(arguments, threads);
  });
}

void group_norm_silu_backward(const Backward& arguments, int64_t threads) {
  with_dtype(arguments.dtype, [&](auto stored) {
    backward_as<decltype(stored), maths_type<decltype(stored), decltype(stored)>>(arguments, threads);
  });
}

}  // namespace rftcore::cpu
