#pragma once

#include "exponential.h"
#include "host_device.h"

namespace rftcore {

template <class T>
RFTCORE_HOST_DEVICE T sigmoid(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    // Four instructions where the polynomial and an IEEE division take thirty, more than a GPU has time for while it
    // waits for memory. By the units' documented errors the relative error is below 5e-7 + 6e-8 |x|, and 0 is returned
    // below -87.
    float power, quotient;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + power));
    return quotient;
  }
#endif
  return T(1) / (T(1) + exponential(-x));
}

template <class T>
RFTCORE_HOST_DEVICE T silu(T x) {
#if defined(__CUDA_ARCH__)
  return x * sigmoid(x);
#else
  return x / (T(1) + exponential(-x));
#endif
}

// Of x, with the gradient of silu(x).
template <class T>
RFTCORE_HOST_DEVICE T silu_gradient(T x, T grad) {
  const T s = sigmoid(x);
  return grad * s * (T(1) + x * (T(1) - s));
}

}  // namespace rftcore
