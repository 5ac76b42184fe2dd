#pragma once

#include <cstdint>

#include "../common/attention.h"

namespace rftcore::cpu {

void attention_forward(const attention::Forward& arguments, int64_t threads);
void attention_backward(const attention::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
