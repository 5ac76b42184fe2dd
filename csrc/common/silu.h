#pragma once

#include "exponential.h"
#include "host_device.h"

namespace rftcore {

template <class T>
RFTCORE_HOST_DEVICE T silu(T x) {
  return x / (T(1) + exponential(-x));
}

template <class T>
RFTCORE_HOST_DEVICE T silu_gradient(T x) {
  const T sigmoid = T(1) / (T(1) + exponential(-x));
  return sigmoid * (T(1) + x * (T(1) - sigmoid));
}

}  // namespace rftcore
