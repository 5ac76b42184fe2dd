// group_norm_silu on the CPU. Both memory formats are matrices to the vector loops: where channels are neighbours, a
// row is a position and a column a channel; where a channel's positions are neighbours, they are folded into rows, and
// all columns are that channel. A thread takes a group, whose values are still in its cache when they are read again,
// or some positions of all channels. Sums are taken per strip and added in an order that does not depend on the number
// of threads.
#include "group_norm_silu.h"

#include <algorithm>
#include <vector>

#include "group_norm_silu_loops.h"
#include "parallel.h"

namespace rftcore::cpu {

using namespace group_norm_silu;
using namespace group_norm_silu_loops;

namespace {

// A tile of so many positions is still in the second-level cache when it is read again, and pays for its sums.
constexpr int64_t kTilePositions = 128;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kElementsPerThread = 131072;
// Of fp32, 4 MiB each of x, grad_y and grad_x: in a third-level cache, and enough for some threads.
constexpr int64_t kElementsPerRun = 1048576;

// The constants of every channel of every sample, looked up once: a group's by fill, of the channel `index` for all
// columns by only, of it and its neighbours by from.
template <class T>
struct Table {
  explicit Table(const Problem& p)
      : center(p.batch * p.channels), gain(p.batch * p.channels), offset(p.batch * p.channels) {}

  void fill(const Problem& p, const void* mean, const void* inverse_deviation, int64_t sample, int64_t group) {
    const int64_t per_group = p.channels_per_group();
    for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
      const Channel<T> channel = channel_at<T>(p, mean, inverse_deviation, sample, c);
      const int64_t index = sample * p.channels + c;
      center[index] = channel.center;
      gain[index] = channel.gain;
      offset[index] = channel.offset;
    }
  }

  Channels<Shared<T>> only(int64_t index) const { return {{center[index]}, {gain[index]}, {offset[index]}}; }
  Channels<const T*> from(int64_t index) const { return {&center[index], &gain[index], &offset[index]}; }

  std::vector<T> center, gain, offset;
};

// Likewise, of the channels' gradients.
template <class T>
struct GradientTable {
  explicit GradientTable(const Problem& p) : constant(p.batch * p.channels), slope(p.batch * p.channels) {}

  Gradients<Shared<T>> only(int64_t index) const { return {{constant[index]}, {slope[index]}}; }
  Gradients<const T*> from(int64_t index) const { return {&constant[index], &slope[index]}; }

  std::vector<T> constant, slope;
};

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

// Calls function(index, piece) for every piece of `samples` samples from `first` on.
template <class Function>
void for_pieces(const Problem& p, int64_t first, int64_t samples, int64_t threads, const Function& function) {
  const int64_t per_sample = pieces_per_sample(p), count = samples * per_sample;
  if (count == 0) return;
  const int64_t elements = std::max<int64_t>(1, p.channels * p.positions / per_sample);
  parallel_for(count, std::max<int64_t>(1, kElementsPerThread / elements), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = first * per_sample + begin; i < first * per_sample + end; ++i) function(i, piece_at(p, i));
  });
}

// Calls function(first, samples) on runs of samples that cover the batch. Where the whole is read twice, a run's values
// are still in the third-level cache the second time.
template <class Function>
void for_samples(const Problem& p, const Function& function) {
  const int64_t run = std::max<int64_t>(1, kElementsPerRun / std::max<int64_t>(1, p.channels * p.positions));
  for (int64_t first = 0; first < p.batch; first += run) function(first, std::min(run, p.batch - first));
}

// Calls function(strip, channel) on strips that cover a piece of a matrix of positions times channels.
template <class Function>
void cut_positions(const Problem& p, const Piece& piece, const Function& function) {
  const int64_t offset = (piece.sample * p.positions + piece.first_position) * p.channels;
  for (int64_t c = 0; c < p.channels; c += kColumns)
    function(Strip{offset + c, piece.positions, p.channels, std::min(kColumns, p.channels - c)}, c);
}

// Calls function(strip) on strips that cover the positions of a channel, which are neighbours.
template <class Function>
void cut_channel(const Problem& p, int64_t sample, int64_t c, const Function& function) {
  const int64_t offset = (sample * p.channels + c) * p.positions, rows = p.positions / kFold;
  for (int64_t row = 0; row < rows; row += kFoldedRows)
    function(Strip{offset + row * kFold, std::min(kFoldedRows, rows - row), kFold, kFold});
  if (const int64_t rest = p.positions % kFold) function(Strip{offset + rows * kFold, 1, kFold, rest});
}

Strip whole_channel(const Problem& p, int64_t sample, int64_t c) {
  return {(sample * p.channels + c) * p.positions, 1, p.positions, p.positions};
}

// Adds a piece's values to the moments of its sample's groups.
template <class Stored, class T>
void add_moments(const Problem& p, const Piece& piece, Moments* groups) {
  const auto bias = [&](int64_t c) { return p.channel_bias.get(piece.sample * p.channels + c, T(0)); };
  if (!p.channels_last) {
    for (int64_t c = piece.first_channel; c < piece.first_channel + piece.channels; ++c)
      cut_channel(p, piece.sample, c, [&](const Strip& strip) {
        const Stored* x = static_cast<const Stored*>(p.x) + strip.offset;
        Moments moments =
            strip.width == kFold ? channel_moments<true, T>(x, strip) : channel_moments<false, T>(x, strip);
        moments.mean += bias(c);
        groups[c / p.channels_per_group()].merge(moments);
      });
    return;
  }
  cut_positions(p, piece, [&](const Strip& strip, int64_t channel) {
    double means[kColumns], squares[kColumns];
    column_moments<T>(static_cast<const Stored*>(p.x) + strip.offset, strip, means, squares);
    for (int64_t column = 0; p.channel_bias && column < strip.width; ++column) means[column] += bias(channel + column);
    for (int64_t column = 0; column < strip.width;) {
      const int64_t group = (channel + column) / p.channels_per_group();
      const int64_t last = std::min(strip.width, (group + 1) * p.channels_per_group() - channel);
      groups[group].merge(moments_of_equal_parts(strip.rows, means + column, squares + column, last - column));
      column = last;
    }
  });
}

template <class Stored, class T>
void write_piece(const Forward& a, const Piece& piece, const Table<T>& table) {
  const auto write = [&](const Strip& strip, auto channels) {
    const Stored* x = static_cast<const Stored*>(a.x) + strip.offset;
    Stored* y = static_cast<Stored*>(a.y) + strip.offset;
    a.silu ? write_output<true>(x, strip, channels, y) : write_output<false>(x, strip, channels, y);
  };
  const int64_t first = piece.sample * a.channels;
  if (a.channels_last)
    cut_positions(a, piece, [&](const Strip& strip, int64_t c) { write(strip, table.from(first + c)); });
  else
    for (int64_t c = piece.first_channel; c < piece.first_channel + piece.channels; ++c)
      write(whole_channel(a, piece.sample, c), table.only(first + c));
}

template <class Stored, class T>
void forward_as(const Forward& a, int64_t threads) {
  std::vector<Moments> moments(a.batch * a.groups);
  Table<T> table(a);
  const auto finish = [&](int64_t sample, int64_t group) {
    const int64_t index = sample * a.groups + group;
    static_cast<T*>(a.mean)[index] = T(moments[index].mean);
    static_cast<T*>(a.inverse_deviation)[index] = T(moments[index].inverse_deviation(a.eps));
    table.fill(a, a.mean, a.inverse_deviation, sample, group);
  };
  if (!a.channels_last) {
    for_pieces(a, 0, a.batch, threads, [&](int64_t index, const Piece& piece) {
      add_moments<Stored, T>(a, piece, &moments[piece.sample * a.groups]);
      finish(piece.sample, index % a.groups);
      write_piece<Stored>(a, piece, table);
    });
    return;
  }
  const int64_t pieces = pieces_per_sample(a);
  std::vector<Moments> partial(a.batch * pieces * a.groups);
  for_samples(a, [&](int64_t first, int64_t samples) {
    for_pieces(a, first, samples, threads, [&](int64_t index, const Piece& piece) {
      add_moments<Stored, T>(a, piece, &partial[index * a.groups]);
    });
    for (int64_t index = first * pieces; index < (first + samples) * pieces; ++index)
      for (int64_t group = 0; group < a.groups; ++group)
        moments[index / pieces * a.groups + group].merge(partial[index * a.groups + group]);
    for (int64_t group = first * a.groups; group < (first + samples) * a.groups; ++group)
      finish(group / a.groups, group % a.groups);
    for_pieces(a, first, samples, threads,
               [&](int64_t, const Piece& piece) { write_piece<Stored>(a, piece, table); });
  });
}

// Adds a piece's values to the sums of its sample's channels.
template <class Stored, class T>
void add_sums(const Backward& a, const Piece& piece, const Table<T>& table, ChannelSums* channels) {
  const int64_t first = piece.sample * a.channels;
  const auto add = [&](auto silu_follows, const Strip& strip, int64_t c) {
    const Stored* x = static_cast<const Stored*>(a.x) + strip.offset;
    const Stored* grad_y = static_cast<const Stored*>(a.grad_y) + strip.offset;
    Stored* grad_x = static_cast<Stored*>(a.grad_x) + strip.offset;
    if (a.channels_last)
      add_column_sums<silu_follows()>(x, grad_y, strip, table.from(first + c), channels + c, grad_x);
    else if (strip.width == kFold)
      channels[c].add(channel_sums<true, silu_follows()>(x, grad_y, strip, table.only(first + c), grad_x));
    else
      channels[c].add(channel_sums<false, silu_follows()>(x, grad_y, strip, table.only(first + c), grad_x));
  };
  const auto take = [&](const Strip& strip, int64_t c) {
    a.silu ? add(std::true_type{}, strip, c) : add(std::false_type{}, strip, c);
  };
  if (a.channels_last) return cut_positions(a, piece, take);
  for (int64_t c = piece.first_channel; c < piece.first_channel + piece.channels; ++c)
    cut_channel(a, piece.sample, c, [&](const Strip& strip) { take(strip, c); });
}

template <class Stored, class T>
void write_gradient_of_piece(const Backward& a, const Piece& piece, const Table<T>& table,
                             const GradientTable<T>& gradients) {
  const auto write = [&](const Strip& strip, auto channels, auto gradient) {
    const Stored* x = static_cast<const Stored*>(a.x) + strip.offset;
    const Stored* grad_y = static_cast<const Stored*>(a.grad_y) + strip.offset;
    Stored* grad_x = static_cast<Stored*>(a.grad_x) + strip.offset;
    a.silu ? write_gradient<true>(x, grad_y, strip, channels, gradient, grad_x)
           : write_gradient<false>(x, grad_y, strip, channels, gradient, grad_x);
  };
  const int64_t first = piece.sample * a.channels;
  if (a.channels_last)
    cut_positions(a, piece, [&](const Strip& strip, int64_t c) {
      write(strip, table.from(first + c), gradients.from(first + c));
    });
  else
    for (int64_t c = piece.first_channel; c < piece.first_channel + piece.channels; ++c)
      write(whole_channel(a, piece.sample, c), table.only(first + c), gradients.only(first + c));
}

template <class Stored, class T>
void backward_as(const Backward& a, int64_t threads) {
  std::vector<ChannelSums> sums(a.batch * a.channels);
  Table<T> table(a);
  GradientTable<T> gradients(a);
  for (int64_t group = 0; group < a.batch * a.groups; ++group)
    table.fill(a, a.mean, a.inverse_deviation, group / a.groups, group % a.groups);
  const auto finish = [&](int64_t sample, int64_t group) {
    const int64_t first = sample * a.channels, per_group = a.channels_per_group();
    const GroupGradient gradient = group_gradient<T>(a, &sums[first], sample, group);
    for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
      gradients.constant[first + c] = T(gradient.constant);
      gradients.slope[first + c] = T(gradient.slope);
      modulation_gradients<T>(a, sums[first + c], gradient, sample, c);
    }
  };
  if (!a.channels_last) {
    for_pieces(a, 0, a.batch, threads, [&](int64_t index, const Piece& piece) {
      add_sums<Stored>(a, piece, table, &sums[piece.sample * a.channels]);
      finish(piece.sample, index % a.groups);
      write_gradient_of_piece<Stored>(a, piece, table, gradients);
    });
  } else {
    const int64_t pieces = pieces_per_sample(a);
    std::vector<ChannelSums> partial(a.batch * pieces * a.channels);
    for_samples(a, [&](int64_t first, int64_t samples) {
      for_pieces(a, first, samples, threads, [&](int64_t index, const Piece& piece) {
        add_sums<Stored>(a, piece, table, &partial[index * a.channels]);
      });
      for (int64_t index = first * pieces; index < (first + samples) * pieces; ++index)
        for (int64_t c = 0; c < a.channels; ++c)
          sums[index / pieces * a.channels + c].add(partial[index * a.channels + c]);
      for (int64_t group = first * a.groups; group < (first + samples) * a.groups; ++group)
        finish(group / a.groups, group % a.groups);
      for_pieces(a, first, samples, threads,
                 [&](int64_t, const Piece& piece) { write_gradient_of_piece<Stored>(a, piece, table, gradients); });
    });
  }
  if (a.grad_weight || a.grad_bias)
    for (int64_t c = 0; c < a.channels; ++c) {
      AffineGradients affine;
      for (int64_t sample = 0; sample < a.batch; ++sample) affine.add<T>(a, sums[sample * a.channels + c], sample, c);
      affine.write(a, c);
    }
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

int64_t group_norm_silu_workspace(const Problem&, Pass) { return 0; }

}  // namespace rftcore::cpu
