// Gradients of weight, bias, channel_bias, scale and shift, from the sums of channels.
#pragma once

#include "group_norm_silu_parts.h"

namespace rftcore::cuda {

constexpr int kSumRows = kThreads / kWarp;

// The block's sums of `value` over rows of threads, on the first row.
__device__ inline double sum_of_rows(double value, double* scratch) {
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

}  // namespace rftcore::cuda
