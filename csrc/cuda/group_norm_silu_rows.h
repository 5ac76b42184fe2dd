// Two launches where a channel's positions are neighbours: a team of lanes takes a chunk of one channel.
#pragma once

#include "group_norm_silu_columns.h"

namespace rftcore::cuda {

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

}  // namespace rftcore::cuda
