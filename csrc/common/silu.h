#pragma once

#include "exponential.h"
#include "host_device.h"

namespace rftcore {

template <class T>
RFTCORE_HOST_DEVICE T silu(T x) {
  return x / (T(1) + exponential(-x));
}

// Of x, with the gradient of silu(x).
template <class T>
RFTCORE_HOST_DEVICE T silu_gradient(T x, T grad) {
  const T sigmoid = T(1) / (T(1) + exponential(-x));
  return grad * sigmoid * (T(1) + x * (T(1) - sigmoid));
}

}  // namespace rftcore
