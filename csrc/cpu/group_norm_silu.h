#pragma once

#include <cstdint>

#include "../common/group_norm_silu.h"

namespace rftcore::cpu {

void group_norm_silu_forward(const group_norm_silu::Forward& arguments, int64_t threads);
void group_norm_silu_backward(const group_norm_silu::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
