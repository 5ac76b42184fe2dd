// Asynchronous copies to shared memory.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { emulation::commit(); }
inline void __pipeline_wait_prior(size_t groups) { emulation::wait_prior(groups); }
