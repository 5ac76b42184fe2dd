// The Python border of geglu, the same for both modules: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "geglu.h"

namespace rftcore::geglu {

// `resource` is what the device needs to run: a number of threads on the CPU, a stream on a GPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  const auto in = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const auto out = [](uintptr_t address) { return reinterpret_cast<void*>(address); };

  module.def(
      "geglu_forward",
      [=](int dtype, int64_t rows, int64_t width, uintptr_t u, uintptr_t y, Resource resource) {
        forward({{dtype, rows, width}, in(u), out(y)}, resource);
      },
      Guard());

  module.def(
      "geglu_backward",
      [=](int dtype, int64_t rows, int64_t width, uintptr_t u, uintptr_t grad_y, uintptr_t grad_u, Resource resource) {
        backward({{dtype, rows, width}, in(u), in(grad_y), out(grad_u)}, resource);
      },
      Guard());
}

}  // namespace rftcore::geglu
