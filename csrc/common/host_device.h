// Functions that are compiled for the CPU and, by nvcc, for the GPU as well.
#pragma once

#if defined(__CUDACC__)
#define RFTCORE_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: inside a function cloned for AVX it must become AVX code too.
#define RFTCORE_HOST_DEVICE inline __attribute__((always_inline))
#else
#define RFTCORE_HOST_DEVICE inline
#endif
