// The Python border of attention: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <tuple>

#include "attention.h"

namespace pybind11::detail {

// Heads come from Python as (address, strides).
template <>
struct type_caster<rftcore::attention::Heads> {
  PYBIND11_TYPE_CASTER(rftcore::attention::Heads, const_name("tuple[int, int, int, int, int]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source) || len(source) != 5) return false;
    const auto five = reinterpret_borrow<tuple>(source);
    value = {reinterpret_cast<void*>(five[0].cast<uintptr_t>()), five[1].cast<int64_t>(), five[2].cast<int64_t>(),
             five[3].cast<int64_t>(), five[4].cast<int64_t>()};
    return true;
  }
};

}  // namespace pybind11::detail

namespace rftcore::attention {

// `resource` is what the device needs to run: a number of threads on the CPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;

  module.def(
      "attention_forward",
      [=](int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim, double scale,
          Heads q, Heads k, Heads v, Heads o, uintptr_t lse, Resource resource) {
        forward({{dtype, batch, heads, queries, keys, head_dim, scale, q, k, v}, o, reinterpret_cast<void*>(lse)},
                resource);
      },
      Guard());

  module.def(
      "attention_backward",
      [=](int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim, double scale,
          Heads q, Heads k, Heads v, Heads grad_o, Heads o, uintptr_t lse, Heads grad_q, Heads grad_k, Heads grad_v,
          Resource resource) {
        backward({{dtype, batch, heads, queries, keys, head_dim, scale, q, k, v},
                  grad_o, o, reinterpret_cast<const void*>(lse), grad_q, grad_k, grad_v},
                 resource);
      },
      Guard());
}

}  // namespace rftcore::attention
