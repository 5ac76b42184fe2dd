// rftcore._cuda. Importing it needs no driver: the runtime is linked in and touches the GPU on the first launch.
#include <pybind11/pybind11.h>

#include "../common/group_norm_silu_binding.h"
#include "../common/sampler_step_binding.h"
#include "device.h"
#include "group_norm_silu.h"
#include "sampler_step.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Ops on CUDA tensors, by address.";
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = RFTCORE_CUDA_COMPILER;
    info["flags"] = RFTCORE_CUDA_FLAGS;
    info["architectures"] = RFTCORE_CUDA_ARCHITECTURES;
    return info;
  });
  module.def("why_no_device", rftcore::cuda::why_no_device);
  rftcore::group_norm_silu::bind<uintptr_t>(module, rftcore::cuda::group_norm_silu_forward,
                                            rftcore::cuda::group_norm_silu_backward,
                                            rftcore::cuda::group_norm_silu_workspace);
  rftcore::sampler_step::bind<uintptr_t>(module, rftcore::cuda::sampler_step_forward,
                                         rftcore::cuda::sampler_step_backward);
}
