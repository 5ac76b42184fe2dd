// One launch: a cluster keeps a tile of a sample in shared memory, its blocks a share of the positions each.
#pragma once

#include <cuda_pipeline.h>

#include "group_norm_silu_columns.h"

namespace rftcore::cuda {

// Stages in which a resident block waits for its data, so that it computes while the rest arrives.
constexpr int kStages = 4;

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

}  // namespace rftcore::cuda
