// group_norm_silu on a GPU. Statistics, and the sums of the backward, are those of a whole group of a sample, and each
// is spread over many blocks. Either a first launch writes what every block finds of its groups, and every block of a
// second one merges the few parts its groups have; or, where a tile of channels fits the shared memory of a cluster of
// blocks, one launch does both and reads its inputs once. Nothing is added atomically: the order is always the same.
#include "group_norm_silu.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../common/dtypes.h"
#include "block.h"
#include "group_norm_silu_cut.h"
#include "launch.h"

namespace rftcore::cuda {

using namespace group_norm_silu;

namespace {

// Loads that a thread of the backward has in flight, of each of two tensors.
constexpr int kLoadPairs = 2;
// What leaves so many registers that none are spilled, and enough threads to wait for memory.
constexpr int kBlocksPerProcessor = 2, kForwardBlocksPerProcessor = 3;
// Stages in which a resident block waits for its data, so that it computes while the rest arrives.
constexpr int kStages = 4;

template <class Stored>
using maths_of = maths_type<Stored, Stored>;

template <class T>
struct Part {
  T count, mean, squares;  // squares: sum of squared distances from the mean
};

template <class T>
struct Statistics {
  T mean, inverse_deviation;
};

template <class T>
__device__ Statistics<T> statistics_of(const Part<T>& part, double eps) {
  return {part.mean, T(1) / std::sqrt((part.count > T(0) ? part.squares / part.count : T(0)) + T(eps))};
}

// The parts part(0) to part(parts - 1) as one, on each lane of a team that shares them. Distances are taken from the
// first part's mean, `pilot`: no difference of large squares, and no division per part.
template <class T, class Parts>
__device__ __forceinline__ Part<T> merged(int parts, int lane, int lanes, T pilot, const Parts& part) {
  T count = 0, sum = 0, squares = 0;
  for (int i = lane; i < parts; i += lanes) {
    const Part<T> each = part(i);
    count += each.count;
    sum += each.count * (each.mean - pilot);
  }
  count = lane_sum(count, lanes);
  sum = lane_sum(sum, lanes);
  const T shift = count > T(0) ? sum / count : T(0);
  for (int i = lane; i < parts; i += lanes) {
    const Part<T> each = part(i);
    const T distance = (each.mean - pilot) - shift;
    squares += each.squares + each.count * distance * distance;
  }
  return {count, pilot + shift, lane_sum(squares, lanes)};
}

// Sums of the values that a thread meets, about the first of them: which is at most sqrt(count) of their standard
// deviations away from their mean.
template <class T>
struct Running {
  T pilot = 0, sum = 0, squares = 0;

  __device__ __forceinline__ void add(T value) {
    const T distance = value - pilot;
    sum += distance;
    squares += distance * distance;
  }

  // Of `count` values; 0 of none.
  __device__ __forceinline__ Part<T> part(T count, T inverse_count) const {
    const T shift = sum * inverse_count, about_mean = squares - shift * sum;
    return {count, pilot + shift, about_mean < T(0) ? T(0) : about_mean};
  }
};

template <class T>
__device__ __forceinline__ T inverse_of_count(int count) {
  return count > 0 ? T(1) / T(count) : T(0);
}

// Sums of one group of one sample: of gain g, and of gain g d.
template <class T>
struct GradientSums {
  T g, gd;
};

// grad_x is gain g + constant + slope d: group_gradient of csrc/common, of sums that hold the gain already.
template <class T>
struct Slope {
  T constant, slope;

  __device__ __forceinline__ Slope(const Cut& cut, const GradientSums<T>& sums, T inverse_deviation) {
    const T inverse_count = T(1) / (T(cut.per_group) * T(cut.positions > 0 ? cut.positions : 1));
    constant = -sums.g * inverse_count;
    slope = -sums.gd * inverse_count * inverse_deviation * inverse_deviation;
  }

  __device__ __forceinline__ Slope(T constant = 0, T slope = 0) : constant(constant), slope(slope) {}
};

// Where the parts of a group of a sample lie in the workspace, two values each.
template <class T>
__device__ __forceinline__ T* parts_at(void* workspace, const Problem& p, const Cut& cut, int64_t sample, int group) {
  return static_cast<T*>(workspace) + (sample * p.groups + group) * cut.parts() * 2;
}

// The workspace of the backward: parts of groups, then (constant, slope) of groups, then, where gradients other than
// that of x are needed, three sums per sample, chunk and channel.
struct BackwardWorkspace {
  int64_t gradients, channels, end;

  RFTCORE_HOST_DEVICE BackwardWorkspace(const Problem& p, const Cut& cut, bool per_channel)
      : gradients(p.batch * p.groups * cut.parts() * 2),
        channels(gradients + p.batch * p.groups * 2),
        end(channels + (per_channel ? p.batch * cut.chunks * p.channels * 3 : 0)) {}
};

// A group's moments from the workspace.
template <class T>
__device__ Part<T> merged_parts(const Cut& cut, const T* parts, int lane, int lanes) {
  return merged(cut.parts(), lane, lanes, parts[0],
                [&](int i) { return Part<T>{cut.count<T>(i), parts[2 * i], parts[2 * i + 1]}; });
}

template <class T>
__device__ GradientSums<T> summed_parts(const Cut& cut, const T* parts, int lane, int lanes) {
  GradientSums<T> sums = {};
  for (int i = lane; i < cut.parts(); i += lanes) {
    sums.g += parts[2 * i];
    sums.gd += parts[2 * i + 1];
  }
  return {lane_sum(sums.g, lanes), lane_sum(sums.gd, lanes)};
}

// Channels are neighbours: threads are columns, a vector of channels each, times rows.

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

// A channel's positions are neighbours: a team of lanes takes a chunk of one channel.

struct Item {
  int64_t sample;
  int channel, group, chunk, part;
  int64_t offset, stride;
  int lane, lanes, vectors;
  bool valid;  // a team in excess repeats the last item without writing

  __device__ __forceinline__ Item(const Problem& p, const Cut& cut, int vector, int64_t block)
      : lane(int(threadIdx.x) % cut.columns), lanes(cut.columns) {
    const int64_t items = p.batch * p.channels * cut.chunks;
    int64_t item = block * cut.rows + int(threadIdx.x) / cut.columns;
    valid = item < items;
    item = valid ? item : items - 1;
    chunk = int(item % cut.chunks);
    sample = item / cut.chunks / cut.channels;
    channel = int(item / cut.chunks - sample * cut.channels);
    group = channel / cut.per_group;
    part = chunk * cut.pieces + channel % cut.per_group;
    offset = (sample * cut.channels + channel) * cut.positions + chunk * cut.chunk_positions + lane * vector;
    stride = int64_t(lanes) * vector;
    const int of_chunk = cut.positions_of(chunk) / vector;
    vectors = of_chunk / lanes + (lane < of_chunk % lanes);
  }
};

template <class Stored, int kVector>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerProcessor)
    row_moments_kernel(const __grid_constant__ Forward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Item here(a, cut, kVector, blockIdx.x);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  Running<T> running;
  if (here.vectors) running.pilot = convert<T>(*x);
  stream<kLoads>(
      here.vectors, [&](int k) { return Vector::load(x + k * here.stride); },
      [&](int, const Vector& pack) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) running.add(convert<T>(pack.values[v]));
      });
  const Part<T> own = running.part(T(here.vectors * kVector), inverse_of_count<T>(here.vectors * kVector));
  const T pilot = __shfl_sync(kAllLanes, own.mean, 0, here.lanes);
  const Part<T> part = merged(here.lanes, here.lane, here.lanes, pilot, [&](int) { return own; });
  if (!here.valid || here.lane) return;
  T* const to = parts_at<T>(a.workspace, a, cut, here.sample, here.group) + 2 * here.part;
  to[0] = part.mean + a.channel_bias.get(here.sample * a.channels + here.channel, T(0));
  to[1] = part.squares;
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerProcessor)
    row_output_kernel(const __grid_constant__ Forward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Item here(a, cut, kVector, int64_t(gridDim.x) - 1 - blockIdx.x);
  const T* const parts = parts_at<T>(a.workspace, a, cut, here.sample, here.group);
  const Statistics<T> found = statistics_of(merged_parts(cut, parts, here.lane, here.lanes), a.eps);
  if (!here.valid) return;
  if (here.lane == 0 && here.part == 0) {
    const int64_t index = here.sample * a.groups + here.group;
    static_cast<T*>(a.mean)[index] = found.mean;
    static_cast<T*>(a.inverse_deviation)[index] = found.inverse_deviation;
  }
  const Channel<T> channel = channel_of(a, found.mean, found.inverse_deviation, here.sample, here.channel);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  Stored* const y = static_cast<Stored*>(a.y) + here.offset;
  stream<kLoads>(
      here.vectors, [&](int k) { return Vector::load(x + k * here.stride); },
      [&](int k, const Vector& pack) {
        Vector out;
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          out.values[v] = convert<Stored>(output<silu_follows>(channel, convert<T>(pack.values[v])));
        out.store(y + k * here.stride);
      });
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    row_sums_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Item here(a, cut, kVector, blockIdx.x);
  const Statistics<T> statistics = load_statistics<T>(a, here.sample, here.group);
  const Channel<T> channel = channel_of(a, statistics.mean, statistics.inverse_deviation, here.sample, here.channel);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Stored* const grad_y = static_cast<const Stored*>(a.grad_y) + here.offset;
  T g = 0, gd = 0, d = 0;
  stream<kLoadPairs>(
      here.vectors,
      [&](int k) {
        return PackPair<Stored, kVector>{Vector::load(x + k * here.stride), Vector::load(grad_y + k * here.stride)};
      },
      [&](int, const PackPair<Stored, kVector>& pack) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const T value = convert<T>(pack.x.values[v]), distance = value - channel.center;
          const T gradient = affined_gradient<silu_follows>(channel, value, convert<T>(pack.grad_y.values[v]));
          g += gradient;
          gd += gradient * distance;
          d += distance;
        }
      });
  g = lane_sum(g, here.lanes);
  gd = lane_sum(gd, here.lanes);
  d = lane_sum(d, here.lanes);
  if (!here.valid || here.lane) return;
  T* const to = parts_at<T>(a.workspace, a, cut, here.sample, here.group) + 2 * here.part;
  to[0] = channel.gain * g;
  to[1] = channel.gain * gd;
  if (!a.per_channel()) return;
  T* const sums = static_cast<T*>(a.workspace) + BackwardWorkspace(a, cut, true).channels +
                  ((here.sample * cut.chunks + here.chunk) * a.channels + here.channel) * 3;
  sums[0] = g;
  sums[1] = gd;
  sums[2] = d;
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    row_gradient_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Item here(a, cut, kVector, int64_t(gridDim.x) - 1 - blockIdx.x);
  const T* const parts = parts_at<T>(a.workspace, a, cut, here.sample, here.group);
  const GradientSums<T> sums = summed_parts(cut, parts, here.lane, here.lanes);
  if (!here.valid) return;
  const Statistics<T> statistics = load_statistics<T>(a, here.sample, here.group);
  const Slope<T> slope[1] = {Slope<T>(cut, sums, statistics.inverse_deviation)};
  if (here.lane == 0 && here.part == 0) store_slope(a, cut, here.sample, here.group, slope[0]);
  const Channel<T> channel = channel_of(a, statistics.mean, statistics.inverse_deviation, here.sample, here.channel);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Stored* const grad_y = static_cast<const Stored*>(a.grad_y) + here.offset;
  Stored* const grad_x = static_cast<Stored*>(a.grad_x) + here.offset;
  Channel<T> channels[kVector];
  Slope<T> slopes[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    channels[v] = channel;
    slopes[v] = slope[0];
  }
  stream<kLoadPairs>(
      here.vectors,
      [&](int k) {
        return PackPair<Stored, kVector>{Vector::load(x + k * here.stride), Vector::load(grad_y + k * here.stride)};
      },
      [&](int k, const PackPair<Stored, kVector>& pack) {
        gradients<silu_follows>(channels, slopes, pack).store(grad_x + k * here.stride);
      });
}

// Gradients of weight, bias, channel_bias, scale and shift, from the sums of channels.

constexpr int kSumRows = kThreads / kWarp;

// The block's sums of `value` over rows of threads, on the first row.
__device__ double sum_of_rows(double value, double* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  double sum = 0;
  for (int row = 0; row < kSumRows; ++row) sum += scratch[row * kWarp + threadIdx.x % kWarp];
  __syncthreads();
  return sum;
}

// A block takes 32 channels: of one sample, for what each sample has its own of, or of all, for weight and bias.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    channel_gradients_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut) {
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const BackwardWorkspace at(a, cut, true);
  const T* const workspace = static_cast<const T*>(a.workspace);
  const int64_t tiles = (a.channels + kWarp - 1) / kWarp;
  const int64_t sample = blockIdx.x / tiles, own = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
  const int64_t c = own < a.channels ? own : a.channels - 1;
  const int row = int(threadIdx.x) / kWarp;
  const auto sums_at = [&](int64_t sample_and_chunk) {
    const T* const from = workspace + at.channels + (sample_and_chunk * a.channels + c) * 3;
    return ChannelSums{double(from[0]), double(from[1]), double(from[2])};
  };
  const bool writes = own < a.channels && row == 0;
  if (sample < a.batch) {
    ChannelSums sums;
    for (int64_t chunk = row; chunk < cut.chunks; chunk += kSumRows) sums.add(sums_at(sample * cut.chunks + chunk));
    sums = {sum_of_rows(sums.g, scratch), sum_of_rows(sums.gd, scratch), sum_of_rows(sums.d, scratch)};
    const T* const gradient = workspace + at.gradients + (sample * a.groups + c / a.channels_per_group()) * 2;
    if (writes) modulation_gradients<T>(a, sums, {double(gradient[0]), double(gradient[1])}, sample, c);
  } else {
    AffineGradients affine;
    for (int64_t i = row; i < a.batch * cut.chunks; i += kSumRows) affine.add<T>(a, sums_at(i), i / cut.chunks, c);
    affine.weight = sum_of_rows(affine.weight, scratch);
    affine.bias = sum_of_rows(affine.bias, scratch);
    if (writes) affine.write(a, c);
  }
}

// One launch: a cluster keeps a tile of a sample in shared memory, its blocks a share of the positions each.

// A thread's own vectors of one tensor, copied asynchronously. No other thread reads them.
template <class Stored, int kVector>
struct Slots {
  uint4* first;  // of this thread
  int stride;

  __device__ __forceinline__ Pack<Stored, kVector> operator[](int k) const {
    return Pack<Stored, kVector>::load(reinterpret_cast<const Stored*>(first + k * stride));
  }
};

__device__ __forceinline__ int vectors_per_stage(int vectors) { return (vectors + kStages - 1) / kStages; }

// Calls copy(k) for every vector, in kStages stages.
template <class Copy>
__device__ __forceinline__ void start_stages(int vectors, const Copy& copy) {
  const int per_stage = vectors_per_stage(vectors);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    for (int k = stage * per_stage; k < vectors && k < (stage + 1) * per_stage; ++k) copy(k);
    __pipeline_commit();
  }
}

// Calls use(k) as soon as vector k of every tensor is there.
template <class Use>
__device__ __forceinline__ void await_stages(int vectors, const Use& use) {
  const int per_stage = vectors_per_stage(vectors);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    __pipeline_wait_prior(kStages - 1 - stage);
    for (int k = stage * per_stage; k < vectors && k < (stage + 1) * per_stage; ++k) use(k);
  }
}

// Blocks of a cluster are neighbours, and its chunks.
__device__ __forceinline__ Place resident_place(const Cut& cut, int vector) {
  const unsigned cluster = blockIdx.x / unsigned(cut.chunks);
  return Place(cut, vector, int(cluster % unsigned(cut.tiles)), int(blockIdx.x % unsigned(cut.chunks)),
               cluster / unsigned(cut.tiles));
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerProcessor)
    resident_forward_kernel(const __grid_constant__ Forward a, const __grid_constant__ Cut cut, int slots) {
  using T = maths_of<Stored>;
  using Vector = Pack<Stored, kVector>;
  const Place here = resident_place(cut, kVector);
  const Cluster cluster = {cut.chunks};
  auto* const data = reinterpret_cast<uint4*>(shared_memory());
  const Entries<T> entries(cut, reinterpret_cast<T*>(data + slots * blockDim.x));
  const Table<T> table(cut, entries.at(2, 0, 0));
  T* const bias = table.at(3, 0);
  auto* const statistics = reinterpret_cast<Statistics<T>*>(table.at(4, 0));
  auto* const parts = reinterpret_cast<Part<T>*>(statistics + cut.tile_groups);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Slots<Stored, kVector> kept = {data + threadIdx.x, int(blockDim.x)};

  start_stages(here.vectors,
               [&](int k) { __pipeline_memcpy_async(kept.first + k * kept.stride, x + k * here.stride, 16); });
  load_channel_bias(a, here, bias);
  Running<T> running[kVector];
  await_stages(here.vectors, [&](int k) {
    const Vector pack = kept[k];
    if (k == 0) set_pilots(pack, running);
    add_values(pack, running);
  });
  reduce_moments(cut, here, running, a.channel_bias ? bias : nullptr, entries,
                 [&](int group, const Part<T>& part) { parts[group] = part; });
  cluster.arrive();
  cluster.wait();
  for_groups(here.groups, [&](int group, int lane, int lanes, bool writes) {
    const Part<T> part = merged(cluster.blocks, lane, lanes, cluster.at(parts, 0)[group].mean,
                                [&](int rank) { return cluster.at(parts, rank)[group]; });
    if (!writes) return;
    statistics[group] = statistics_of(part, a.eps);
    if (here.writes_statistics()) store_statistics(a, here, group, statistics[group]);
  });
  // No block may end while another reads its shared memory.
  cluster.arrive();
  __syncthreads();
  Channel<T> channels[kVector];
  load_channels(a, here, statistics, table, channels);
  Stored* const y = static_cast<Stored*>(a.y) + here.offset;
  for (int k = 0; k < here.vectors; ++k) outputs<silu_follows>(channels, kept[k]).store(y + k * here.stride);
  cluster.wait();
}

template <class Stored, int kVector, bool silu_follows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    resident_backward_kernel(const __grid_constant__ Backward a, const __grid_constant__ Cut cut, int slots) {
  using T = maths_of<Stored>;
  const Place here = resident_place(cut, kVector);
  const Cluster cluster = {cut.chunks};
  auto* const data = reinterpret_cast<uint4*>(shared_memory());
  const Entries<T> entries(cut, reinterpret_cast<T*>(data + 2 * slots * blockDim.x));
  const Table<T> table(cut, entries.at(2, 0, 0));
  auto* const statistics = reinterpret_cast<Statistics<T>*>(table.at(5, 0));
  auto* const of_groups = reinterpret_cast<Slope<T>*>(statistics + cut.tile_groups);
  auto* const parts = reinterpret_cast<GradientSums<T>*>(of_groups + cut.tile_groups);
  const Stored* const x = static_cast<const Stored*>(a.x) + here.offset;
  const Stored* const grad_y = static_cast<const Stored*>(a.grad_y) + here.offset;
  const Slots<Stored, kVector> kept_x = {data + threadIdx.x, int(blockDim.x)};
  const Slots<Stored, kVector> kept_grad_y = {data + slots * blockDim.x + threadIdx.x, int(blockDim.x)};

  start_stages(here.vectors, [&](int k) {
    __pipeline_memcpy_async(kept_x.first + k * kept_x.stride, x + k * here.stride, 16);
    __pipeline_memcpy_async(kept_grad_y.first + k * kept_grad_y.stride, grad_y + k * here.stride, 16);
  });
  Channel<T> channels[kVector];
  load_tile_statistics(a, here, statistics);
  load_channels(a, here, statistics, table, channels);
  ColumnSums<T, kVector, false> sums;
  await_stages(here.vectors, [&](int k) {
    sums.template add<silu_follows>(channels, PackPair<Stored, kVector>{kept_x[k], kept_grad_y[k]});
  });
  reduce_sums(cut, here, sums, table, entries,
              [&](int group, const GradientSums<T>& of_group) { parts[group] = of_group; });
  cluster.arrive();
  cluster.wait();
  for (int group = int(threadIdx.x); group < here.groups; group += int(blockDim.x)) {
    GradientSums<T> total = {};
    for (int rank = 0; rank < cluster.blocks; ++rank) {
      const GradientSums<T>& part = cluster.at(parts, rank)[group];
      total.g += part.g;
      total.gd += part.gd;
    }
    of_groups[group] = Slope<T>(cut, total, statistics[group].inverse_deviation);
  }
  cluster.arrive();
  __syncthreads();
  Slope<T> slopes[kVector];
  load_slopes(here, of_groups, table, slopes);
  Stored* const grad_x = static_cast<Stored*>(a.grad_x) + here.offset;
  for (int k = 0; k < here.vectors; ++k)
    gradients<silu_follows>(channels, slopes, PackPair<Stored, kVector>{kept_x[k], kept_grad_y[k]})
        .store(grad_x + k * here.stride);
  cluster.wait();
}

// The host's side.

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Values in 16 bytes.
template <class Stored>
constexpr int kVectorOf = 16 / int(sizeof(Stored));

// Calls function(vector): with 16 bytes at a time where addresses and shape allow that.
template <class Stored, class Function>
void with_vector(const Problem& p, bool is_aligned, const Function& function) {
  is_aligned && fits_vectors(p, kVectorOf<Stored>) ? function(Constant<kVectorOf<Stored>>{}) : function(Constant<1>{});
}

template <class Function>
void with_flag(bool flag, const Function& function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

// One position: both memory formats are the same, and a channel has nothing to share among lanes.
template <class Arguments>
Arguments normalised(const Arguments& arguments) {
  Arguments a = arguments;
  a.channels_last = a.channels_last || a.positions <= 1;
  return a;
}

template <class Stored>
Cut cut_of(const Problem& p, int vector) {
  return p.channels_last ? cut_columns(p, vector, sizeof(Stored)) : cut_rows(p, vector);
}

int64_t blocks_of(const Problem& p, const Cut& cut) {
  return p.channels_last ? p.batch * cut.tiles * cut.chunks : ceil_div(p.batch * p.channels * cut.chunks, cut.rows);
}

// Bytes of shared memory for `planes` entries per thread and channel, and `per_channel` and `per_group` values of each.
template <class T>
int64_t shared_bytes(const Cut& cut, int64_t planes, int64_t per_channel, int64_t per_group) {
  return ((planes * cut.rows + per_channel) * cut.tile_channels + per_group * cut.tile_groups) * int64_t(sizeof(T));
}

template <class Stored, int kVector, bool silu>
void forward_as(const Forward& a, uintptr_t stream) {
  using T = maths_of<Stored>;
  const char* const name = "group_norm_silu_forward";
  if constexpr (kVector > 1) {
    const auto kernel = resident_forward_kernel<Stored, kVector, silu>;
    if (const Resident resident = cut_resident(a, kVector, sizeof(Stored), 1, architecture_of(name, kernel))) {
      const Cut& cut = resident.cut;
      const Grid grid = {blocks_of(a, cut), cut.threads(), resident.data_bytes + shared_bytes<T>(cut, 2, 4, 5),
                         cut.chunks};
      if (grid.shared_bytes <= shared_limit(name)) return launch(name, kernel, grid, stream, a, cut, resident.slots);
    }
  }
  const Cut cut = cut_of<Stored>(a, kVector);
  const int64_t blocks = blocks_of(a, cut);
  if (a.channels_last) {
    launch(name, column_moments_kernel<Stored, kVector>, {blocks, cut.threads(), shared_bytes<T>(cut, 2, 1, 0)}, stream,
           a, cut);
    launch(name, column_output_kernel<Stored, kVector, silu>, {blocks, cut.threads(), shared_bytes<T>(cut, 0, 3, 2)},
           stream, a, cut);
  } else {
    launch(name, row_moments_kernel<Stored, kVector>, {blocks, kThreads}, stream, a, cut);
    launch(name, row_output_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
  }
}

template <class Stored, int kVector, bool silu>
void backward_as(const Backward& a, uintptr_t stream) {
  using T = maths_of<Stored>;
  const char* const name = "group_norm_silu_backward";
  if constexpr (kVector > 1) {
    const auto kernel = resident_backward_kernel<Stored, kVector, silu>;
    if (!a.per_channel())
      if (const Resident resident = cut_resident(a, kVector, sizeof(Stored), 2, architecture_of(name, kernel))) {
        const Cut& cut = resident.cut;
        const Grid grid = {blocks_of(a, cut), cut.threads(), resident.data_bytes + shared_bytes<T>(cut, 2, 5, 6),
                           cut.chunks};
        if (grid.shared_bytes <= shared_limit(name)) return launch(name, kernel, grid, stream, a, cut, resident.slots);
      }
  }
  const Cut cut = cut_of<Stored>(a, kVector);
  const int64_t blocks = blocks_of(a, cut);
  if (blocks > 0) {
    if (a.channels_last) {
      with_flag(a.per_channel(), [&](auto per_channel) {
        launch(name, column_sums_kernel<Stored, kVector, silu, per_channel()>,
               {blocks, cut.threads(), shared_bytes<T>(cut, per_channel() ? 3 : 2, 3, 2)}, stream, a, cut);
      });
      launch(name, column_gradient_kernel<Stored, kVector, silu>,
             {blocks, cut.threads(), shared_bytes<T>(cut, 0, 5, 4)}, stream, a, cut);
    } else {
      launch(name, row_sums_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
      launch(name, row_gradient_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
    }
  }
  if (!a.per_channel()) return;
  launch(name, channel_gradients_kernel<T>,
         {ceil_div(a.channels, kWarp) * (a.batch + 1), kThreads, int64_t(kThreads * sizeof(double))}, stream, a, cut);
}

}  // namespace

void group_norm_silu_forward(const Forward& arguments, uintptr_t stream) {
  if (arguments.batch == 0) return;
  const Forward a = normalised(arguments);
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    with_vector<Stored>(a, aligned(a.x, a.y), [&](auto vector) {
      with_flag(a.silu, [&](auto silu) { forward_as<Stored, vector(), silu()>(a, stream); });
    });
  });
}

void group_norm_silu_backward(const Backward& arguments, uintptr_t stream) {
  // Gradients of weight and bias are written, 0, where there is no sample.
  if (arguments.batch == 0 && !arguments.per_channel()) return;
  const Backward a = normalised(arguments);
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    with_vector<Stored>(a, aligned(a.x, a.grad_y, a.grad_x), [&](auto vector) {
      with_flag(a.silu, [&](auto silu) { backward_as<Stored, vector(), silu()>(a, stream); });
    });
  });
}

int64_t group_norm_silu_workspace(const Problem& problem, Pass pass) {
  const Problem p = normalised(problem);
  int64_t elements = 0;
  with_dtype(p.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    // Addresses that are not aligned are not known yet.
    for (int vector : {1, kVectorOf<Stored>}) {
      if (vector > 1 && !fits_vectors(p, vector)) continue;
      const Cut cut = cut_of<Stored>(p, vector);
      const BackwardWorkspace backward(p, cut, pass == Pass::backward_per_channel);
      elements = std::max(elements, pass == Pass::forward ? backward.gradients : backward.end);
    }
  });
  return elements;
}

}  // namespace rftcore::cuda
