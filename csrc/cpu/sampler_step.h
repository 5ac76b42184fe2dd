#pragma once

#include <cstdint>

#include "../common/sampler_step.h"

namespace rftcore::cpu {

void sampler_step_forward(const sampler_step::Forward& arguments, int64_t threads);
void sampler_step_backward(const sampler_step::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
