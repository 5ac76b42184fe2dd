#pragma once

#include <cstdint>

#include "../common/lora_linear.h"

namespace rftcore::cpu {

void lora_add(const lora_linear::Forward& arguments, int64_t threads);
void lora_grads(const lora_linear::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
