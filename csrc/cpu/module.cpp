// rftcore._cpu
#include <pybind11/pybind11.h>

#include "../common/attention_binding.h"
#include "../common/geglu_binding.h"
#include "../common/group_norm_silu_binding.h"
#include "../common/layer_norm_binding.h"
#include "../common/lora_linear_binding.h"
#include "../common/sampler_step_binding.h"
#include "attention.h"
#include "geglu.h"
#include "group_norm_silu.h"
#include "layer_norm.h"
#include "lora_linear.h"
#include "sampler_step.h"
#include "simd.h"

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Ops on CPU tensors, by address.";
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = RFTCORE_COMPILER;
    info["flags"] = RFTCORE_FLAGS;
    info["simd"] = rftcore::simd_level();
    info["cuda"] = RFTCORE_CUDA_STATUS;
    return info;
  });
  rftcore::attention::bind<int64_t>(module, rftcore::cpu::attention_forward, rftcore::cpu::attention_backward);
  rftcore::geglu::bind<int64_t>(module, rftcore::cpu::geglu_forward, rftcore::cpu::geglu_backward);
  rftcore::group_norm_silu::bind<int64_t>(module, rftcore::cpu::group_norm_silu_forward,
                                          rftcore::cpu::group_norm_silu_backward,
                                          rftcore::cpu::group_norm_silu_workspace);
  rftcore::layer_norm::bind<int64_t>(module, rftcore::cpu::layer_norm_forward, rftcore::cpu::layer_norm_backward);
  rftcore::lora_linear::bind<int64_t>(module, rftcore::cpu::lora_add, rftcore::cpu::lora_grads);
  rftcore::sampler_step::bind<int64_t>(module, rftcore::cpu::sampler_step_forward, rftcore::cpu::sampler_step_backward);
}
