// What a test sets and asks, by ctypes.
#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_reset(int capability, unsigned seed) {
  emulation::Machine& m = emulation::machine();
  m.capability = capability;
  m.random.seed(seed);
  m.launches = m.largest_cluster = 0;
}

EXPORTED int emulation_launches() { return emulation::machine().launches; }

EXPORTED int emulation_largest_cluster() { return emulation::machine().largest_cluster; }
