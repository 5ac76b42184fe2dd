// The Python border of lora_linear, the same for both modules: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "lora_linear.h"
#include "vector_binding.h"

namespace rftcore::lora_linear {

// Each a tuple of the members of a struct, in their order.
using AdapterTuple = std::tuple<int64_t, int64_t, int, double, Vector, Vector, Vector, Vector>;
using OutputTuple = std::tuple<int64_t, Vector, Vector>;
using GradOutputTuple = std::tuple<int64_t, Vector>;

template <class Struct, class Tuple>
std::vector<Struct> structs(const std::vector<Tuple>& tuples) {
  std::vector<Struct> values;
  values.reserve(tuples.size());
  for (const Tuple& tuple : tuples)
    values.push_back(std::apply([](const auto&... members) { return Struct{members...}; }, tuple));
  return values;
}

// `resource` is what the device needs to run: a number of threads on the CPU, a stream on a GPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;

  module.def(
      "lora_add",
      [=](int64_t rows, int64_t width, Vector n, const std::vector<AdapterTuple>& adapters,
          const std::vector<OutputTuple>& outputs, Resource resource) {
        forward({{rows, width, n, structs<Adapter>(adapters)}, structs<Output>(outputs)}, resource);
      },
      Guard());

  module.def(
      "lora_grads",
      [=](int64_t rows, int64_t width, Vector n, const std::vector<AdapterTuple>& adapters,
          const std::vector<GradOutputTuple>& grads, Vector grad_n, Resource resource) {
        backward({{rows, width, n, structs<Adapter>(adapters)}, structs<GradOutput>(grads), grad_n}, resource);
      },
      Guard());
}

}  // namespace rftcore::lora_linear
