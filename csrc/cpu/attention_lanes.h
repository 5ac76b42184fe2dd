// A vector of numbers in the lanes of one register: loads, transposes, exponentials and logarithms.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/host_device.h"
#include "wide.h"

namespace rftcore::cpu::attention_tiles {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// Vectors of `Bytes` bytes.
template <class T, int Bytes>
struct Vectors {
  using V = typename Lanes<T, Bytes>::type;
  static constexpr int kLanes = Bytes / int(sizeof(T));

  static RFTCORE_HOST_DEVICE V load(const T* from) {
    V lanes;
    memcpy(&lanes, from, Bytes);
    return lanes;
  }

  static RFTCORE_HOST_DEVICE void store(T* to, const V& lanes) { memcpy(to, &lanes, Bytes); }

  // The second where one is a NaN.
  static RFTCORE_HOST_DEVICE V larger(const V& a, const V& b) {
#if defined(__GNUC__)
    return a > b ? a : b;
#else
    V result;
    for (int i = 0; i < kLanes; ++i) result[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
#endif
  }

#if defined(RFTCORE_SHUFFLES)
  template <class To, class From>
  static RFTCORE_HOST_DEVICE To same_bits(const From& from) {
    To to;
    memcpy(&to, &from, Bytes);
    return to;
  }

  template <int Half, int... Lane>
  static RFTCORE_HOST_DEVICE void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
    const V first = __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane - Half : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane : Lane + Half)...);
    a = first;
  }

  // The quarters off the diagonal change places, and so on in each quarter.
  template <int Half = kLanes / 2>
  static RFTCORE_HOST_DEVICE void transpose(V (&rows)[kLanes]) {
    if constexpr (Half > 0) {
      for (int i = 0; i < kLanes; ++i)
        if (!(i & Half)) exchange<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes>());
      transpose<Half / 2>(rows);
    }
  }
#else
  static void transpose(V (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const T value = rows[i][j];
        rows[i][j] = rows[j][i], rows[j][i] = value;
      }
  }
#endif

  // For x that are at most a little above 0; 0 below -87.7, and relative to the result within 2e-7 + 1e-7 |x|.
  static RFTCORE_HOST_DEVICE V exponential(V x) {
#if defined(RFTCORE_SHUFFLES)
    if constexpr (std::is_same_v<T, float>) {
      x = larger(V{} - 127.0f, x * float(kLog2E));
      // Adding 1.5 * 2^23 rounds to an integer n, and with 127 more the sum ends in the exponent of 2^n.
      const float shift = 12582912.0f + 127.0f;
      const V shifted = x + shift;
      const V r = x - (shifted - shift);
      using Bits = typename Lanes<int32_t, Bytes>::type;
      const V power = same_bits<V>(same_bits<Bits>(shifted) << 23);
      // 2^r, fitted in the minimax sense to 9.2e-8, with 2^0 = 1: a maximum that stays scales sums by 1.
      V p = 1.32647272e-3f * r + 9.67151264e-3f;
      p = p * r + 5.55073374e-2f;
      p = p * r + 0.240222421f;
      p = p * r + 0.693146978f;
      p = p * r + 1.0f;
      return p * power;
    }
#endif
    for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
  }

  // Of normal numbers. A NaN stays one.
  static RFTCORE_HOST_DEVICE V logarithm(V x) {
#if defined(RFTCORE_SHUFFLES)
    if constexpr (std::is_same_v<T, float>) {
      // x = 2^n m, with m between the roots of 1/2 and 2, and log(m) = 2 artanh(u).
      using Bits = typename Lanes<int32_t, Bytes>::type;
      const Bits bits = same_bits<Bits>(x);
      const Bits n = (bits - 0x3f3504f3) >> 23;
      const V m = same_bits<V>(bits - (n << 23));
      const V u = (m - 1.0f) / (m + 1.0f), u2 = u * u;
      const V series = ((float(2.0 / 9) * u2 + float(2.0 / 7)) * u2 + float(2.0 / 5)) * u2 + float(2.0 / 3);
      return __builtin_convertvector(n, V) * float(kLn2) + (u * u2 * series + 2.0f * u) + (x - x);
    }
#endif
    for (int i = 0; i < kLanes; ++i) x[i] = std::log(x[i]);
    return x;
  }
};

}  // namespace rftcore::cpu::attention_tiles
