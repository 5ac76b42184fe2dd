#pragma once

#include <cstdint>

#include "../common/group_norm_silu.h"

namespace rftcore::cuda {

// `stream` is a cudaStream_t.
void group_norm_silu_forward(const group_norm_silu::Forward& arguments, uintptr_t stream);
void group_norm_silu_backward(const group_norm_silu::Backward& arguments, uintptr_t stream);
// In elements of the maths type; from the shape alone.
int64_t group_norm_silu_workspace(const group_norm_silu::Problem& problem, group_norm_silu::Pass pass);

}  // namespace rftcore::cuda
