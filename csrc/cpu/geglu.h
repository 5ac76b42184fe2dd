#pragma once

#include <cstdint>

#include "../common/geglu.h"

namespace rftcore::cpu {

void geglu_forward(const geglu::Forward& arguments, int64_t threads);
void geglu_backward(const geglu::Backward& arguments, int64_t threads);

}  // namespace rftcore::cpu
