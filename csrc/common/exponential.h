// exp without a branch and without a library call, so that a loop over it is vectorised.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "host_device.h"

namespace rftcore {

// Within 1.5 units in the last place; 0 below -87.3, infinite above 88.4.
RFTCORE_HOST_DEVICE float exponential(float x) {
  const float above = x < -88.0f ? -88.0f : x;
  const float bounded = above > 89.0f ? 89.0f : above;  // a NaN compares false and passes
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the last bits of the sum.
  const float shifted = bounded * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts: the first has so few bits that n times it is exact.
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = r + p * r * r + 1.0f;
  return p * float_of((bits_of(shifted) + 127u) << 23);
}

RFTCORE_HOST_DEVICE double exponential(double x) { return exp(x); }

}  // namespace rftcore
