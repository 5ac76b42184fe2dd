// Two launches where channels are neighbours: threads are columns, a vector of channels each, times rows.
#pragma once

#include "group_norm_silu_parts.h"

namespace rftcore::cuda {

// What a block, and a thread of it, takes.
struct Place {
  int64_t sample;
  int chunk, piece;
  int first_channel, channels, first_group, groups, per_group;  // of the tile, and of a group's part in it
  int column, row, positions;
  int64_t offset;  // in elements, of the thread's first vector
  int64_t stride;  // from one of its vectors to the next
  int vectors;     // that the thread takes; 0 for one that is in excess

  __device__ __forceinline__ Place(const Cut& cut, int vector, int tile, int chunk, int64_t sample)
      : sample(sample), chunk(chunk) {
    if (cut.pieces == 1) {
      piece = 0;
      first_channel = tile * cut.tile_channels;
      first_group = tile * cut.tile_groups;
      channels = cut.channels - first_channel;
      channels = channels < cut.tile_channels ? channels : cut.tile_channels;
      per_group = cut.per_group;
      groups = channels / per_group;
    } else {
      piece = tile % cut.pieces;
      first_group = tile / cut.pieces;
      first_channel = first_group * cut.per_group + piece * cut.piece_channels;
      channels = per_group = cut.channels_of(piece);
      groups = 1;
    }
    positions = cut.positions_of(chunk);
    column = int(threadIdx.x) % cut.columns;
    row = int(threadIdx.x) / cut.columns;
    offset = (sample * cut.positions + chunk * cut.chunk_positions + row) * cut.channels + first_channel +
             column * vector;
    stride = int64_t(cut.rows) * cut.channels;
    vectors = row < cut.rows && column * vector < channels ? vectors_of(cut, row) : 0;
  }

  // Vectors, of each of its columns, that a row takes.
  __device__ __forceinline__ int vectors_of(const Cut& cut, int row) const {
    return positions / cut.rows + (row < positions % cut.rows);
  }

  __device__ __forceinline__ bool writes_statistics() const { return chunk == 0 && piece == 0; }
};

// Of a two-launch block. Tiles come first: neighbouring blocks read neighbouring memory.
__device__ __forceinline__ Place place_of(const Cut& cut, int vector, unsigned block) {
  const unsigned rest = block / unsigned(cut.tiles);
  return Place(cut, vector, int(block % unsigned(cut.tiles)), int(rest % unsigned(cut.chunks)),
               rest / unsigned(cut.chunks));
}

// Calls body(group, lane, lanes, writes) with every group of a tile, a team of lanes each. All threads call it.
template <class Body>
__device__ __forceinline__ void for_groups(int groups, const Body& body) {
  int lanes = kWarp;
  while (lanes > 1 && lanes * groups > int(blockDim.x)) lanes /= 2;
  const int teams = int(blockDim.x) / lanes, lane = int(threadIdx.x) % lanes;
  for (int first = 0; first < groups; first += teams) {
    const int group = first + int(threadIdx.x) / lanes;
    // A team in excess repeats the last group, for the sake of the lanes beside it.
    body(group < groups ? group : groups - 1, lane, lanes, lane == 0 && group < groups);
  }
}

// What threads find of their channels: planes of (rows, tile_channels).
template <class T>
struct Entries {
  T* values;
  int rows, width;

  __device__ __forceinline__ Entries(const Cut& cut, T* values)
      : values(values), rows(cut.rows), width(cut.tile_channels) {}

  __device__ __forceinline__ T* at(int plane, int row, int channel) const {
    return values + (plane * rows + row) * width + channel;
  }
};

// Moments of each group in the tile over the block's positions, given to write(group, part) by one thread.
// `bias`: (tile_channels,) or null.
template <class T, int kVector, class Write>
__device__ void reduce_moments(const Cut& cut, const Place& here, const Running<T> (&running)[kVector], const T* bias,
                               const Entries<T>& entries, const Write& write) {
  const int first = here.column * kVector;
  if (here.row < cut.rows && first < here.channels) {
    Pack<T, kVector> means, squares;
    const T inverse_count = inverse_of_count<T>(here.vectors);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Part<T> part = running[v].part(T(here.vectors), inverse_count);
      means.values[v] = part.mean + (bias && here.vectors ? bias[first + v] : T(0));
      squares.values[v] = part.squares;
    }
    means.store(entries.at(0, here.row, first));
    squares.store(entries.at(1, here.row, first));
  }
  __syncthreads();
  const int width = here.per_group, count = width * cut.rows;
  for_groups(here.groups, [&](int group, int lane, int lanes, bool writes) {
    const Part<T> part = merged(count, lane, lanes, *entries.at(0, 0, group * width), [&](int i) {
      const int row = int(unsigned(i) / unsigned(width)), c = group * width + i - row * width;
      return Part<T>{T(here.vectors_of(cut, row)), *entries.at(0, row, c), *entries.at(1, row, c)};
    });
    if (writes) write(group, part);
  });
}

template <class T>
__device__ __forceinline__ void load_channel_bias(const Problem& p, const Place& here, T* bias) {
  if (!p.channel_bias) return;
  for (int c = int(threadIdx.x); c < here.channels; c += int(blockDim.x))
    bias[c] = p.channel_bias.get(here.sample * p.channels + here.first_channel + c, T(0));
  __syncthreads();
}

// Constants of the tile's channels, planes of (tile_channels,) in shared memory.
template <class T>
struct Table {
  T* values;
  int width;

  __device__ __forceinline__ Table(const Cut& cut, T* values) : values(values), width(cut.tile_channels) {}

  __device__ __forceinline__ T* at(int plane, int channel) const { return values + plane * width + channel; }
};

constexpr int kCenter = 0, kGain = 1, kOffset = 2, kConstant = 3, kSlope = 4;

// Fills the table's first three planes, and then a thread's own channels. `statistics`: of the tile's groups.
template <class T, int kVector>
__device__ void load_channels(const Problem& p, const Place& here, const Statistics<T>* statistics,
                              const Table<T>& table, Channel<T> (&own)[kVector]) {
  for (int c = int(threadIdx.x); c < here.channels; c += int(blockDim.x)) {
    const Statistics<T>& group = statistics[c / here.per_group];
    const Channel<T> channel =
        channel_of(p, group.mean, group.inverse_deviation, here.sample, here.first_channel + c);
    *table.at(kCenter, c) = channel.center;
    *table.at(kGain, c) = channel.gain;
    *table.at(kOffset, c) = channel.offset;
  }
  __syncthreads();
  // Of a thread in excess, whatever lies there.
  const int first = here.vectors ? here.column * kVector : 0;
  const auto center = Pack<T, kVector>::load(table.at(kCenter, first));
  const auto gain = Pack<T, kVector>::load(table.at(kGain, first));
  const auto offset = Pack<T, kVector>::load(table.at(kOffset, first));
#pragma unroll
  for (int v = 0; v < kVector; ++v) own[v] = {center.values[v], gain.values[v], offset.values[v]};
}

template <class T>
__device__ __forceinline__ void store_statistics(const Forward& a, const Place& here, int group,
                                                 const Statistics<T>& statistics) {
  const int64_t index = here.sample * a.groups + here.first_group + group;
  static_cast<T*>(a.mean)[index] = statistics.mean;
  static_cast<T*>(a.inverse_deviation)[index] = statistics.inverse_deviation;
}

template <class T>
__device__ __forceinline__ Statistics<T> load_statistics(const Backward& a, int64_t sample, int group) {
  const int64_t index = sample * a.groups + group;
  return {static_cast<const T*>(a.mean)[index], static_cast<const T*>(a.inverse_deviation)[index]};
}

// Calls use(k, pack) with the thread's vectors, of which kAtOnce are loaded before the first is used.
template <int kAtOnce, class Load, class Use>
__device__ __forceinline__ void stream(int vectors, const Load& load, const Use& use) {
  int k = 0;
  for (; k + kAtOnce <= vectors; k += kAtOnce) {
    decltype(load(0)) loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) loaded[i] = load(k + i);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) use(k + i, loaded[i]);
  }
  for (; k < vectors; ++k) use(k, load(k));
}

template <class T, class Stored, int kVector>
__device__ __forceinline__ void add_values(const Pack<Stored, kVector>& pack, Running<T> (&running)[kVector]) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) running[v].add(convert<T>(pack.values[v]));
}

template <class T, class Stored, int kVector>
__device__ __forceinline__ void set_pilots(const Pack<Stored, kVector>& pack, Running<T> (&running)[kVector]) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) running[v].pilot = convert<T>(pack.values[v]);
}

template <bool silu_follows, class T, class Stored, int kVector>
__device__ __forceinline__ Pack<Stored, kVector> outputs(const Channel<T> (&channels)[kVector],
                                                         const Pack<Stored, kVector>& x) {
  Pack<Stored, kVector> y;
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    y.values[v] = convert<Stored>(output<silu_follows>(channels[v], convert<T>(x.values[v])));
  return y;
}

template <class Stored, int kVector>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerProcessor)
    column_moments_kernel(const __grid_constant__ Forward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Place here = place_of(cut, kVector, blockIdx.x);
  const Entries<T> entries(cut, reinterpret_cast<T*>(shared_memory()));
  T* const bias = entries.at(2, 0, 0);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  Running<T> running[kVector];
  if (here.vectors) set_pilots(Vector::load(x), running);
  stream<kLoads>(
      here.vectors, [&](int k) { return Vector::load(x + k * here.stride); },
      [&](int, const Vector& pack) { add_values(pack, running); });
  load_channel_bias(a, here, bias);
  reduce_moments(cut, here, running, a.channel_bias ? bias : nullptr, entries,
                 [&](int group, const Part<T>& part) {
                   T* const to = parts_at<T>(a.workspace, a, cut, here.sample, here.first_group + group) +
                                 2 * (here.chunk * cut.pieces + here.piece);
                   to[0] = part.mean;
                   to[1] = part.squares;
                 });
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerProcessor)
    column_output_kernel(const __grid_constant__ Forward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  // Backwards: what the first launch read last is still in the cache.
  const Place here = place_of(cut, kVector, gridDim.x - 1 - blockIdx.x);
  const Table<T> table(cut, reinterpret_cast<T*>(shared_memory()));
  auto* const statistics = reinterpret_cast<Statistics<T>*>(table.at(3, 0));
  for_groups(here.groups, [&](int group, int lane, int lanes, bool writes) {
    const T* const parts = parts_at<T>(a.workspace, a, cut, here.sample, here.first_group + group);
    const Statistics<T> found = statistics_of(merged_parts(cut, parts, lane, lanes), a.eps);
    if (!writes) return;
    statistics[group] = found;
    if (here.writes_statistics()) store_statistics(a, here, group, found);
  });
  __syncthreads();
  Channel<T> channels[kVector];
  load_channels(a, here, statistics, table, channels);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  Stored* const y = static_cast<Stored*>(a.y) + here.offset;
  stream<kLoads>(
      here.vectors, [&](int k) { return Vector::load(x + k * here.stride); },
      [&](int k, const Vector& pack) { outputs<silu_follows>(channels, pack).store(y + k * here.stride); });
}

// A vector of x with the gradient of y.
template <class Stored, int kVector>
struct PackPair {
  Pack<Stored, kVector> x, grad_y;
};

// Sums over a thread's positions.
template <class T, int kVector, bool per_channel>
struct ColumnSums {
  Pack<T, kVector> g = {}, gd = {}, d = {};

  template <bool silu_follows, class Stored>
  __device__ __forceinline__ void add(const Channel<T> (&channels)[kVector], const PackPair<Stored, kVector>& pack) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const T x = convert<T>(pack.x.values[v]), distance = x - channels[v].center;
      const T gradient = affined_gradient<silu_follows>(channels[v], x, convert<T>(pack.grad_y.values[v]));
      g.values[v] += gradient;
      gd.values[v] += gradient * distance;
      if constexpr (per_channel) d.values[v] += distance;
    }
  }
};

template <bool silu_follows, class T, class Stored, int kVector>
__device__ __forceinline__ Pack<Stored, kVector> gradients(const Channel<T> (&channels)[kVector],
                                                           const Slope<T> (&slopes)[kVector],
                                                           const PackPair<Stored, kVector>& pack) {
  Pack<Stored, kVector> grad_x;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const T x = convert<T>(pack.x.values[v]);
    const T g = affined_gradient<silu_follows>(channels[v], x, convert<T>(pack.grad_y.values[v]));
    grad_x.values[v] = convert<Stored>(channels[v].gain * g + slopes[v].constant +
                                       slopes[v].slope * (x - channels[v].center));
  }
  return grad_x;
}

// Sums of each group in the tile over the block's positions, given to write(group, sums) by one thread.
template <class T, int kVector, bool per_channel, class Write>
__device__ void reduce_sums(const Cut& cut, const Place& here, const ColumnSums<T, kVector, per_channel>& sums,
                            const Table<T>& table, const Entries<T>& entries, const Write& write) {
  const int first = here.column * kVector;
  if (here.row < cut.rows && first < here.channels) {
    sums.g.store(entries.at(0, here.row, first));
    sums.gd.store(entries.at(1, here.row, first));
    if constexpr (per_channel) sums.d.store(entries.at(2, here.row, first));
  }
  __syncthreads();
  const int width = here.per_group, count = width * cut.rows;
  for_groups(here.groups, [&](int group, int lane, int lanes, bool writes) {
    GradientSums<T> of_group = {};
    for (int i = lane; i < count; i += lanes) {
      const int row = int(unsigned(i) / unsigned(width)), c = group * width + i - row * width;
      const T gain = *table.at(kGain, c);
      of_group.g += gain * *entries.at(0, row, c);
      of_group.gd += gain * *entries.at(1, row, c);
    }
    of_group = {lane_sum(of_group.g, lanes), lane_sum(of_group.gd, lanes)};
    if (writes) write(group, of_group);
  });
}

// The statistics of the tile's groups, saved by the forward.
template <class T>
__device__ __forceinline__ void load_tile_statistics(const Backward& a, const Place& here, Statistics<T>* statistics) {
  for (int group = int(threadIdx.x); group < here.groups; group += int(blockDim.x))
    statistics[group] = load_statistics<T>(a, here.sample, here.first_group + group);
  __syncthreads();
}

// Fills the table's other two planes, and then a thread's own channels.
template <class T, int kVector>
__device__ __forceinline__ void load_slopes(const Place& here, const Slope<T>* of_groups, const Table<T>& table,
                                            Slope<T> (&own)[kVector]) {
  for (int c = int(threadIdx.x); c < here.channels; c += int(blockDim.x)) {
    const Slope<T>& group = of_groups[c / here.per_group];
    *table.at(kConstant, c) = group.constant;
    *table.at(kSlope, c) = group.slope;
  }
  __syncthreads();
  const int first = here.vectors ? here.column * kVector : 0;
  const auto constant = Pack<T, kVector>::load(table.at(kConstant, first));
  const auto slope = Pack<T, kVector>::load(table.at(kSlope, first));
#pragma unroll
  for (int v = 0; v < kVector; ++v) own[v] = {constant.values[v], slope.values[v]};
}

template <class Stored, int kVector, bool silu_follows, bool per_channel>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    column_sums_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Place here = place_of(cut, kVector, blockIdx.x);
  const Entries<T> entries(cut, reinterpret_cast<T*>(shared_memory()));
  const Table<T> table(cut, entries.at(per_channel ? 3 : 2, 0, 0));
  auto* const statistics = reinterpret_cast<Statistics<T>*>(table.at(3, 0));
  load_tile_statistics(a, here, statistics);
  Channel<T> channels[kVector];
  load_channels(a, here, statistics, table, channels);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Stored* const grad_y = static_cast<const Stored*>(a.grad_y) + here.offset;
  ColumnSums<T, kVector, per_channel> sums;
  stream<kLoadPairs>(
      here.vectors,
      [&](int k) {
        return PackPair<Stored, kVector>{Vector::load(x + k * here.stride), Vector::load(grad_y + k * here.stride)};
      },
      [&](int, const PackPair<Stored, kVector>& pack) { sums.template add<silu_follows>(channels, pack); });
  reduce_sums(cut, here, sums, table, entries,
              [&](int group, const GradientSums<T>& of_group) {
                T* const to = parts_at<T>(a.workspace, a, cut, here.sample, here.first_group + group) +
                              2 * (here.chunk * cut.pieces + here.piece);
                to[0] = of_group.g;
                to[1] = of_group.gd;
              });
  if constexpr (per_channel) {
    T* const to = static_cast<T*>(a.workspace) + BackwardWorkspace(a, cut, true).channels +
                  ((here.sample * cut.chunks + here.chunk) * a.channels + here.first_channel) * 3;
    for (int i = int(threadIdx.x); i < here.channels * 3; i += int(blockDim.x)) {
      T sum = 0;
      for (int row = 0; row < cut.rows; ++row) sum += *entries.at(i % 3, row, i / 3);
      to[i] = sum;
    }
  }
}

template <class T>
__device__ __forceinline__ void store_slope(const Backward& a, const Cut& cut, int64_t sample, int group,
                                            const Slope<T>& slope) {
  T* const to = static_cast<T*>(a.workspace) + BackwardWorkspace(a, cut, false).gradients +
                (sample * a.groups + group) * 2;
  to[0] = slope.constant;
  to[1] = slope.slope;
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    column_gradient_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Place here = place_of(cut, kVector, gridDim.x - 1 - blockIdx.x);
  const Table<T> table(cut, reinterpret_cast<T*>(shared_memory()));
  auto* const statistics = reinterpret_cast<Statistics<T>*>(table.at(5, 0));
  auto* const of_groups = reinterpret_cast<Slope<T>*>(statistics + cut.tile_groups);
  load_tile_statistics(a, here, statistics);
  for_groups(here.groups, [&](int group, int lane, int lanes, bool writes) {
    const T* const parts = parts_at<T>(a.workspace, a, cut, here.sample, here.first_group + group);
    const GradientSums<T> sums = summed_parts(cut, parts, lane, lanes);
    if (!writes) return;
    of_groups[group] = Slope<T>(cut, sums, statistics[group].inverse_deviation);
    if (here.writes_statistics()) store_slope(a, cut, here.sample, here.first_group + group, of_groups[group]);
  });
  Channel<T> channels[kVector];
  Slope<T> slopes[kVector];
  load_channels(a, here, statistics, table, channels);
  load_slopes(here, of_groups, table, slopes);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Stored* const grad_y = static_cast<const Stored*>(a.grad_y) + here.offset;
  Stored* const grad_x = static_cast<Stored*>(a.grad_x) + here.offset;
  stream<kLoadPairs>(
      here.vectors,
      [&](int k) {
        return PackPair<Stored, kVector>{Vector::load(x + k * here.stride), Vector::load(grad_y + k * here.stride)};
      },
      [&](int k, const PackPair<Stored, kVector>& pack) {
        gradients<silu_follows>(channels, slopes, pack).store(grad_x + k * here.stride);
      });
}

}  // namespace rftcore::cuda
