// As much of CUDA as the kernels of csrc/cuda use, executed by machine.h: their sources are compiled as C++ with this
// folder first on the include path.
#pragma once

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Objects and not macros: a launch configuration has members of the same names.
struct {
  struct {
    operator unsigned() const { return emulation::machine().current->index.x; }
  } x;
} inline constexpr threadIdx;

struct {
  struct {
    operator unsigned() const { return emulation::machine().current->block->index.x; }
  } x;
} inline constexpr blockIdx;

struct {
  struct {
    operator unsigned() const { return emulation::machine().block.x; }
  } x;
} inline constexpr blockDim;

struct {
  struct {
    operator unsigned() const { return emulation::machine().grid.x; }
  } x;
} inline constexpr gridDim;

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::sync_warp(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = emulation::machine().current->lane, source = lane ^ lane_mask;
  return emulation::exchange(mask, value, source / width > lane / width ? lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::machine().current->lane;
  return emulation::exchange(mask, value, lane % width + int(delta) < width ? lane + int(delta) : lane);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::machine().current->lane;
  return emulation::exchange(mask, value, lane / width * width + source % width);
}

using cudaStream_t = struct EmulatedStream*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) {
  static std::string text;
  text = emulation::machine().error;
  return text.c_str();
}

inline cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = emulation::machine().architecture;
  return cudaSuccess;
}

// CUDA C++ Programming Guide, technical specifications per compute capability.
inline cudaError_t cudaDeviceGetAttribute(int* bytes, cudaDeviceAttr, int) {
  const int capability = emulation::machine().capability;
  const bool least = capability == 86 || capability == 89 || capability >= 120;
  *bytes = least ? 101376 : capability >= 90 ? 232448 : 166912;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulation::Machine& m = emulation::machine();
  m.error.clear();
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes > limit) emulation::fail("more shared memory than a block can have");
  m.shared_allowed[kernel] = bytes;
  return m.error.empty() ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulation;
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.mutex);
  m.error.clear();
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  const auto allowed = m.shared_allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = allowed == m.shared_allowed.end() ? 49152 : size_t(allowed->second);
  if (blocks == 0 || threads == 0 || threads > 1024) fail("no block, no thread, or too many");
  if (threads % kWarp) fail("a warp without all its lanes: shuffles name all of them");
  if (config->dynamicSmemBytes > limit) fail("more shared memory than was asked for");
  if (cluster == 0 || cluster > 8 || blocks % cluster) fail("clusters do not fit the grid");
  if (config->numAttrs && m.capability < 90) fail("this device has no clusters");
  if (config->numAttrs && m.architecture < 90) fail("code that was compiled for no clusters: its barriers are none");
  if (!m.error.empty()) return cudaErrorInvalidValue;

  const std::tuple<std::decay_t<Parameters>...> values(arguments...);
  m.kernel = [&] { std::apply(kernel, values); };
  m.grid = config->gridDim;
  m.block = config->blockDim;
  ++m.launches;
  m.largest_cluster = std::max(m.largest_cluster, int(cluster));
  std::vector<unsigned> order(blocks / cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (unsigned i : order) {
    run_cluster(int64_t(i) * cluster, int(cluster), int(threads), config->dynamicSmemBytes);
    if (!m.error.empty()) {
      // Fibers that wait where no one will wake them are left behind.
      for (auto& thread : m.threads) (void)thread.release();
      m.threads.clear();
      return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}
