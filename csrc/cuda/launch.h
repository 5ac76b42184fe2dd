#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace rftcore::cuda {

// Throws what the launch just made, or an earlier asynchronous one, went wrong with.
inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace rftcore::cuda
