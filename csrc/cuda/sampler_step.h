#pragma once

#include <cstdint>

#include "../common/sampler_step.h"

namespace rftcore::cuda {

// `stream` is a cudaStream_t.
void sampler_step_forward(const sampler_step::Forward& arguments, uintptr_t stream);
void sampler_step_backward(const sampler_step::Backward& arguments, uintptr_t stream);

}  // namespace rftcore::cuda
