// The way from host code to a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rftcore::cuda {

inline void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// That the current device's code of this kernel is for: 90 for compute capability 9.0. A device may be newer than
// everything that was compiled.
template <class... Parameters>
int architecture_of(const char* name, void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
  return attributes.ptxVersion;
}

// Bytes that a block may have on the current device.
inline int64_t shared_limit(const char* name) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  return bytes;
}

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // of dynamic shared memory, per block
  int cluster = 1;           // blocks that share a cluster; more than 1 for code for 9.0 and later
};

constexpr int64_t kMaxBlocks = 2147483647;
// A block may have so much without being asked about it.
constexpr int64_t kSharedWithoutAttribute = 49152;

// Throws what this launch, or an earlier asynchronous one, went wrong with; `name` says whose it is.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, uintptr_t stream,
            const Arguments&... arguments) {
  if (grid.blocks > kMaxBlocks) throw std::runtime_error(std::string(name) + ": more blocks than a launch can have");
  // Always the same number: another thread may launch this kernel between the two calls.
  if (grid.shared_bytes > kSharedWithoutAttribute)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_limit(name))),
          name);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace rftcore::cuda
