#include "device.h"

#include <cuda_runtime.h>

namespace rftcore::cuda {

const char* why_no_device() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace rftcore::cuda
