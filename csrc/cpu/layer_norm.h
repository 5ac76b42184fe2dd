#pragma once

#include <cstdint>

#include "../common/layer_norm.h"

namespace rftcore::cpu {

void layer_norm_forward(const layer_norm::Forward& arguments, int64_t threads);
void layer_norm_backward(const layer_norm::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
