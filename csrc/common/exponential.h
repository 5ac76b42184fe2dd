// exp without a branch and without a library call, so that a loop over it is vectorised.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "host_device.h"

namespace rftcore {

// Within 1.5 units in the last place; 0 below -87.3, infinite above 88.37.
RFTCORE_HOST_DEVICE float exponential(float x) {
  // Adding 1.5 * 2^23 rounds to an integer n, which is then in the last bits of the sum.
  const float shift = 12582912.0f;
  const int32_t shifted = int32_t(bits_of(x * 1.44269504f + shift));
  // Held between -127 and 128, where 2^n is 0 and infinite. x itself is not held: a compiler that knows that the
  // result is 0 then treats the case apart, and divides twice where silu divides once.
  const int32_t lowest = int32_t(bits_of(shift)) - 127, highest = int32_t(bits_of(shift)) + 128;
  const int32_t above = shifted < lowest ? lowest : shifted;
  const int32_t bounded = above > highest ? highest : above;
  const float n = float_of(uint32_t(bounded)) - shift;
  // ln 2 in two parts: the first has so few bits that n times it is exact.
  const float rest = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float r = rest < -1.0f ? -1.0f : rest;  // only where n was held; a NaN compares false and passes
  // 1 + r + r^2 q(r), with q fitted in the minimax sense to 3.1e-9 of the sum. Halves are added, for a shorter chain.
  const float r2 = r * r;
  const float low = 0.166665195f * r + 0.499999934f;
  const float high = 1.38143205e-3f * r2 + (8.36885107e-3f * r + 4.16684011e-2f);
  const float p = (high * r2 + low) * r2 + (1.0f + r);
  return p * float_of((uint32_t(bounded) + 127u) << 23);
}

RFTCORE_HOST_DEVICE double exponential(double x) { return exp(x); }

}  // namespace rftcore
