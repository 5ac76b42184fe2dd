// What a test sets and asks, by ctypes.
#include "cuda_runtime.h"

#include "cuda_pipeline.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_reset(int capability, int architecture, unsigned seed) {
  emulation::Machine& m = emulation::machine();
  m.capability = capability;
  m.architecture = architecture;
  m.shared_allowed.clear();
  m.random.seed(seed);
  m.launches = m.largest_cluster = 0;
}

EXPORTED int emulation_launches() { return emulation::machine().launches; }

EXPORTED int emulation_largest_cluster() { return emulation::machine().largest_cluster; }

namespace {

// Each breaks a rule.

void divergent_barrier() {
  if (threadIdx.x > 3) __syncthreads();
}

void divergent_shuffle() {
  if (threadIdx.x > 3) __shfl_xor_sync(0xffffffffu, threadIdx.x + 0u, 1);
}

void unawaited_copy() {
  static const uint4 from = {};
  if (threadIdx.x == 0) __pipeline_memcpy_async(emulation::shared_memory(), &from, sizeof from);
}

void unaligned_copy() {
  static const uint4 from = {};
  __pipeline_memcpy_async(emulation::shared_memory() + 4, &from, sizeof from);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

void written_beyond() {
  if (threadIdx.x == 0) emulation::shared_memory()[64] = 1;
}

// Some time before it ends, but with nothing to wait for.
void read_of_an_ended_block() {
  emulation::cluster_arrive();
  emulation::cluster_wait();
  for (int i = 0; i < 9 && blockIdx.x; ++i) __syncthreads();
  if (blockIdx.x == 0) emulation::of_rank(emulation::shared_memory(), 1);
}

}  // namespace

// What the emulation says of the broken kernel `number`, in one of several orders; null where there are no more.
EXPORTED const char* emulation_of_broken(int number) {
  constexpr void (*kKernels[])() = {divergent_barrier, divergent_shuffle, unawaited_copy,
                                    unaligned_copy,    written_beyond,    read_of_an_ended_block};
  if (number >= int(std::size(kKernels))) return nullptr;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 2;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 64;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < 32 && error == cudaSuccess; ++i) error = cudaLaunchKernelEx(&config, kKernels[number]);
  return cudaGetErrorString(error);
}
