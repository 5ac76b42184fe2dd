// What LoRA adapters add to projections of one input n, y_i += sum of scale (n a^T) b^T, and their gradients: the
// arguments both devices take. The specification is lora_linears_reference in rftcore/ops/lora_linear.py.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "host_device.h"
#include "vector.h"

namespace rftcore::lora_linear {

// a: (rank, width); b: (columns of its output, rank). Their gradients are absent where not needed.
struct Adapter {
  int64_t output, rank;
  int dtype;  // a, b, the input and the gradient of the output are rounded to it; sums are of the maths type
  double scale;
  Vector a, b, grad_a, grad_b;
};

struct Problem {
  int64_t rows, width;
  Vector n;                       // (rows, width)
  std::vector<Adapter> adapters;  // in the order of their outputs
};

struct Output {
  int64_t columns;
  Vector y, residual;  // (rows, columns): y is changed in place; a residual, where there is one, is added to it
};

struct Forward : Problem {
  std::vector<Output> outputs;
};

struct GradOutput {
  int64_t columns;
  Vector values;  // (rows, columns)
};

// n may be absent where no grad_a and no grad_b is needed. grad_n, where it is there, is changed in place.
struct Backward : Problem {
  std::vector<GradOutput> grads;
  Vector grad_n;
};

// Whether a value of dtype `from` is rounded when it becomes one of `to`.
RFTCORE_HOST_DEVICE bool narrows(int from, int to) {
  const bool exact = from == to || to == 0 || (to == 1 && from >= 2);
  return !exact;
}

}  // namespace rftcore::lora_linear
