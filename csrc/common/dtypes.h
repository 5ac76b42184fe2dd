// Storage types, their codes at the Python border, and their conversion to the types in which maths is done.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"

namespace rftcore {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// fp64 where an input is fp64, else fp32.
template <class A, class B>
using maths_type =
    std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

// Calls `function` with a value of the type that `code` stands for; rftcore/ops has the same codes.
template <class Function>
void with_dtype(int code, Function&& function) {
  switch (code) {
    case 0: return function(double{});
    case 1: return function(float{});
    case 2: return function(BFloat16{});
    case 3: return function(Half{});
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(code));
}

RFTCORE_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

RFTCORE_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The conversions below have no branch, so that a loop over them is vectorised.

RFTCORE_HOST_DEVICE float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

RFTCORE_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);
  // A subnormal as the distance of two normal numbers: exact, and it survives flush-to-zero.
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  const uint32_t result = exponent == 0x0f800000u ? special : finite;
  return float_of(result | uint32_t(value.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays a NaN.
RFTCORE_HOST_DEVICE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return BFloat16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

// Round to nearest, ties to even; beyond 65504 becomes infinite; a NaN stays a NaN.
RFTCORE_HOST_DEVICE Half to_half(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 moves a number below the smallest normal half to the last ten bits of the sum, rounded.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  return Half{uint16_t(result | (bits >> 16 & 0x8000u))};
#endif
}

template <class To, class From>
RFTCORE_HOST_DEVICE To convert(From value) {
  if constexpr (std::is_same_v<From, BFloat16> || std::is_same_v<From, Half>) {
    return static_cast<To>(to_float(value));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, Half>) {
    return to_half(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace rftcore
