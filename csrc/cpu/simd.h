// One function compiled for several instruction sets, the best one chosen when the module is loaded.
#pragma once

#if defined(RFTCORE_TARGET_CLONES)
#define RFTCORE_SIMD __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define RFTCORE_SIMD
#endif

namespace rftcore {

inline const char* simd_level() {
#if defined(RFTCORE_TARGET_CLONES)
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "the compiler's baseline";
}

}  // namespace rftcore
