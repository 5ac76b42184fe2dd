// The Python border of layer_norm, the same for both modules: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "layer_norm.h"
#include "vector_binding.h"

namespace rftcore::layer_norm {

// `resource` is what the device needs to run: a number of threads on the CPU, a stream on a GPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  const auto in = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const auto out = [](uintptr_t address) { return reinterpret_cast<void*>(address); };

  module.def(
      "layer_norm_forward",
      [=](int dtype, int64_t rows, int64_t width, uintptr_t x, Vector weight, Vector bias, double eps, uintptr_t y,
          uintptr_t mean, uintptr_t inverse_deviation, Resource resource) {
        forward({{dtype, rows, width, in(x), weight}, bias, eps, out(y), out(mean), out(inverse_deviation)}, resource);
      },
      Guard());

  module.def(
      "layer_norm_backward",
      [=](int dtype, int64_t rows, int64_t width, uintptr_t x, Vector weight, uintptr_t mean,
          uintptr_t inverse_deviation, uintptr_t grad_y, uintptr_t grad_x, Vector grad_weight, Vector grad_bias,
          Resource resource) {
        backward({{dtype, rows, width, in(x), weight}, in(mean), in(inverse_deviation), in(grad_y), out(grad_x),
                  grad_weight, grad_bias},
                 resource);
      },
      Guard());
}

}  // namespace rftcore::layer_norm
