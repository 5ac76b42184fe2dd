#pragma once

#include <cstdint>

#include "../common/group_norm_silu.h"

namespace rftcore::cpu {

void group_norm_silu_forward(const group_norm_silu::Forward& arguments, int64_t threads);
void group_norm_silu_backward(const group_norm_silu::Backward& arguments, int64_t threads);
int64_t group_norm_silu_workspace(const group_norm_silu::Problem& problem, group_norm_silu::Pass pass);

}  // namespace rftcore::cpu
