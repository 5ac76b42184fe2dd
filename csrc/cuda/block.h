// What the threads of a block, and the blocks of a cluster, do together. Under another compiler than nvcc all of it is
// emulated (python_tests/cuda_emulation), by the same source.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

#include "../common/dtypes.h"

namespace rftcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, the only one that kernels here use.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
#else
  return emulation::shared_memory();
#endif
}

// The sum over `lanes` neighbouring lanes, a power of 2, on each of them; in an order that never changes.
template <class T>
__device__ __forceinline__ T lane_sum(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// A cluster of `blocks` blocks; of one block, it needs no hardware that has clusters.
struct Cluster {
  int blocks;

  __device__ __forceinline__ int rank() const { return int(blockIdx.x % unsigned(blocks)); }

  // What was written before arriving is seen, in the shared memory of every block, after waiting.
  __device__ __forceinline__ void arrive() const {
    if (blocks == 1) return;
    __syncwarp();  // the barrier is one instruction of a whole warp
#if !defined(__CUDACC__)
    emulation::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_arrive();
#endif
  }

  __device__ __forceinline__ void wait() const {
    if (blocks == 1) return __syncthreads();
    __syncwarp();
#if !defined(__CUDACC__)
    emulation::cluster_wait();
#elif __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  // What `address`, in this block's shared memory, is in that of the block `rank`.
  template <class T>
  __device__ __forceinline__ const T* at(const T* address, int rank) const {
    if (blocks == 1) return address;
#if !defined(__CUDACC__)
    return emulation::of_rank(address, rank);
#elif __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(address, rank);
#else
    return address;
#endif
  }
};

// So many neighbouring values, that are read and written 16 bytes at a time where there are that many.
template <class Stored, int kCount>
struct Pack {
  Stored values[kCount];

  static constexpr int kWords = sizeof(Stored) * kCount / 16;

  static __device__ __forceinline__ Pack load(const Stored* from) {
    Pack pack;
    if constexpr (kWords > 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4 word = reinterpret_cast<const uint4*>(from)[i];
        memcpy(&pack.values[i * (kCount / kWords)], &word, sizeof word);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) pack.values[i] = from[i];
    }
    return pack;
  }

  __device__ __forceinline__ void store(Stored* to) const {
    if constexpr (kWords > 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        uint4 word;
        memcpy(&word, &values[i * (kCount / kWords)], sizeof word);
        reinterpret_cast<uint4*>(to)[i] = word;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = values[i];
    }
  }
};

// Whether every address, null ones included, can be read 16 bytes at a time.
template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace rftcore::cuda
