// Moments and sums of the parts of a group, and how they become those of the whole; where they lie in the workspace.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtypes.h"
#include "../common/group_norm_silu.h"
#include "block.h"
#include "group_norm_silu_cut.h"

namespace rftcore::cuda {

using namespace group_norm_silu;

// Loads that a thread of the backward has in flight, of each of two tensors.
constexpr int kLoadPairs = 2;
// What leaves so many registers that none are spilled, and enough threads to wait for memory.
constexpr int kBlocksPerProcessor = 2, kForwardBlocksPerProcessor = 3;

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

}  // namespace rftcore::cuda
