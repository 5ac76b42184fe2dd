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

// Of the current device: 90 for compute capability 9.0.
inline int compute_capability(const char* name) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), name);
  return 10 * major + minor;
}

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // of dynamic shared memory, per block
  int cluster = 1;           // blocks that share a cluster; more than 1 from compute capability 9.0 on
};

constexpr int64_t kMaxBlocks = 2147483647;
// A block may have so much without being asked about it.
constexpr int64_t kSharedWithoutAttribute = 49152;

// Throws what this launch, or an earlier asynchronous one, went wrong with; `name` says whose it is.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, uintptr_t stream,
            const Arguments&... arguments) {
  if (grid.blocks > kMaxBlocks) throw std::runtime_error(std::string(name) + ": more blocks than a launch can have");
  if (grid.shared_bytes > kSharedWithoutAttribute)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(grid.shared_bytes)),
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
