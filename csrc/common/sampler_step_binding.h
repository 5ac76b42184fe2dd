// The Python border of sampler_step, the same for both modules: pointers, sizes and codes as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "sampler_step.h"

namespace rftcore::sampler_step {

// `resource` is what the device needs to run: a number of threads on the CPU, a stream on a GPU.
template <class Resource>
void bind(pybind11::module_& module, void (*forward)(const Forward&, Resource),
          void (*backward)(const Backward&, Resource)) {
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  const auto in = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const auto out = [](uintptr_t address) { return reinterpret_cast<void*>(address); };

  module.def(
      "sampler_step_forward",
      [=](int sample_dtype, int output_dtype, int64_t batch, int64_t elements, bool guided,
          bool coefficients_per_sample, int divergence, uintptr_t sample, uintptr_t model_output,
          uintptr_t coefficients, uintptr_t noise, uintptr_t next_given, uintptr_t reference_output, uintptr_t next,
          uintptr_t log_prob, uintptr_t distance, Resource resource) {
        forward({{sample_dtype, output_dtype, batch, elements, 1.0 / double(elements), guided, coefficients_per_sample,
                  static_cast<Divergence>(divergence)},
                 in(sample), in(model_output), in(coefficients), in(noise), in(next_given), in(reference_output),
                 out(next), out(log_prob), out(distance)},
                resource);
      },
      Guard());

  module.def(
      "sampler_step_backward",
      [=](int sample_dtype, int output_dtype, int64_t batch, int64_t elements, bool guided,
          bool coefficients_per_sample, int divergence, uintptr_t sample, uintptr_t model_output,
          uintptr_t coefficients, uintptr_t next, uintptr_t reference_output, uintptr_t grad_next,
          uintptr_t grad_log_prob, uintptr_t grad_distance, uintptr_t grad_sample, uintptr_t grad_output,
          Resource resource) {
        backward({{sample_dtype, output_dtype, batch, elements, 1.0 / double(elements), guided, coefficients_per_sample,
                   static_cast<Divergence>(divergence)},
                  in(sample), in(model_output), in(coefficients), in(next), in(reference_output), in(grad_next),
                  in(grad_log_prob), in(grad_distance), out(grad_sample), out(grad_output)},
                 resource);
      },
      Guard());
}

}  // namespace rftcore::sampler_step
