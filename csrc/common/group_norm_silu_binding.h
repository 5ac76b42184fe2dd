// The Python border of group_norm_silu, the same for both modules: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "group_norm_silu.h"
#include "vector_binding.h"

namespace rftcore::group_norm_silu {

// `resource` is what the device needs to run: a number of threads on the CPU, a stream on a GPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource), int64_t (*workspace)(const Problem&, Pass)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  const auto in = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const auto out = [](uintptr_t address) { return reinterpret_cast<void*>(address); };

  module.def(
      "group_norm_silu_forward",
      [=](int dtype, int64_t batch, int64_t channels, int64_t groups, int64_t positions, bool channels_last, bool silu,
          uintptr_t x, Vector weight, Vector bias, Vector channel_bias, Vector scale, Vector shift, double eps,
          uintptr_t y, uintptr_t mean, uintptr_t inverse_deviation, uintptr_t workspace, Resource resource) {
        forward({{dtype, batch, channels, groups, positions, channels_last, silu, in(x), weight, bias, channel_bias,
                  scale, shift},
                 eps, out(y), out(mean), out(inverse_deviation), out(workspace)},
                resource);
      },
      Guard());

  module.def(
      "group_norm_silu_backward",
      [=](int dtype, int64_t batch, int64_t channels, int64_t groups, int64_t positions, bool channels_last, bool silu,
          uintptr_t x, Vector weight, Vector bias, Vector channel_bias, Vector scale, Vector shift, uintptr_t mean,
          uintptr_t inverse_deviation, uintptr_t grad_y, uintptr_t grad_x, Vector grad_weight, Vector grad_bias,
          Vector grad_channel_bias, Vector grad_scale, Vector grad_shift, uintptr_t workspace, Resource resource) {
        backward({{dtype, batch, channels, groups, positions, channels_last, silu, in(x), weight, bias, channel_bias,
                   scale, shift},
                  in(mean), in(inverse_deviation), in(grad_y), out(grad_x), grad_weight, grad_bias, grad_channel_bias,
                  grad_scale, grad_shift, out(workspace)},
                 resource);
      },
      Guard());

  module.def("group_norm_silu_workspace", [=](int dtype, int64_t batch, int64_t channels, int64_t groups,
                                              int64_t positions, bool channels_last, int pass) {
    Problem problem = {};
    problem.dtype = dtype;
    problem.batch = batch;
    problem.channels = channels;
    problem.groups = groups;
    problem.positions = positions;
    problem.channels_last = channels_last;
    return workspace(problem, static_cast<Pass>(pass));
  });
}

}  // namespace rftcore::group_norm_silu
