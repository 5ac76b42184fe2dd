// A short tensor, a few values per channel, of a dtype that is known when it is read: no kernel is compiled per dtype.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "host_device.h"

namespace rftcore {

// Null where the tensor is absent.
struct Vector {
  void* values;
  int dtype;

  RFTCORE_HOST_DEVICE explicit operator bool() const { return values != nullptr; }

  template <class T>
  RFTCORE_HOST_DEVICE T get(int64_t index, T if_absent) const {
    if (!values) return if_absent;
    switch (dtype) {
      case 0: return convert<T>(static_cast<const double*>(values)[index]);
      case 1: return convert<T>(static_cast<const float*>(values)[index]);
      case 2: return convert<T>(static_cast<const BFloat16*>(values)[index]);
      default: return convert<T>(static_cast<const Half*>(values)[index]);
    }
  }

  RFTCORE_HOST_DEVICE void set(int64_t index, double value) const {
    switch (dtype) {
      case 0: static_cast<double*>(values)[index] = value; break;
      case 1: static_cast<float*>(values)[index] = float(value); break;
      case 2: static_cast<BFloat16*>(values)[index] = convert<BFloat16>(value); break;
      default: static_cast<Half*>(values)[index] = convert<Half>(value);
    }
  }
};

}  // namespace rftcore
