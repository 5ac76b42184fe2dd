// Vectors of the widest registers that the processor has, for kernels that cut their work into tiles of them.
#pragma once

#include <type_traits>

namespace rftcore {

// Calls function(bytes) with the width of the widest registers, a constant, compiled for instructions that have them.
// Clones of one function would not do: vectors of 64 bytes take 15 times as long with AVX2 as vectors of 32.
template <class Function>
void at_any_width(const Function& function) {
  function(std::integral_constant<int, 16>());
}

#if defined(RFTCORE_TARGET_CLONES)
template <class Function>
__attribute__((target("avx2,fma"))) void at_32_bytes(const Function& function) {
  function(std::integral_constant<int, 32>());
}

template <class Function>
__attribute__((target("avx512f"))) void at_64_bytes(const Function& function) {
  function(std::integral_constant<int, 64>());
}

template <class Function>
void at_best_width(const Function& function) {
  static const int bytes = __builtin_cpu_supports("avx512f")                                  ? 64
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32
                                                                                             : 16;
  if (bytes == 64) return at_64_bytes(function);
  if (bytes == 32) return at_32_bytes(function);
  at_any_width(function);
}
#else
template <class Function>
void at_best_width(const Function& function) {
  at_any_width(function);
}
#endif

// Lambdas inside such a function must be inlined: they are not compiled for its instructions.
#if defined(__GNUC__)
#define RFTCORE_INLINE_LAMBDA __attribute__((always_inline))
template <class T, int Bytes>
struct Lanes {
  typedef T type __attribute__((vector_size(Bytes)));
};
#else
#define RFTCORE_INLINE_LAMBDA
template <class T, int Bytes>
struct Array {
  static constexpr int kCount = Bytes / sizeof(T);
  T lanes[kCount];

  T& operator[](int i) { return lanes[i]; }
  T operator[](int i) const { return lanes[i]; }

#define RFTCORE_LANEWISE(op)                                               \
  friend Array operator op(const Array& a, const Array& b) {               \
    Array result;                                                          \
    for (int i = 0; i < kCount; ++i) result[i] = a[i] op b[i];             \
    return result;                                                         \
  }                                                                        \
  friend Array operator op(const Array& a, T b) { return a op filled(b); } \
  friend Array operator op(T a, const Array& b) { return filled(a) op b; } \
  Array& operator op##=(const Array& b) { return *this = *this op b; }
  RFTCORE_LANEWISE(+)
  RFTCORE_LANEWISE(-)
  RFTCORE_LANEWISE(*)
  RFTCORE_LANEWISE(/)
#undef RFTCORE_LANEWISE

 private:
  static Array filled(T value) {
    Array result;
    for (int i = 0; i < kCount; ++i) result[i] = value;
    return result;
  }
};
template <class T, int Bytes>
struct Lanes {
  using type = Array<T, Bytes>;
};
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && __has_builtin(__builtin_convertvector)
#define RFTCORE_SHUFFLES
#endif
#endif

}  // namespace rftcore
