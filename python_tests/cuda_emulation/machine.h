// A GPU on the CPU, which runs a launch's blocks and threads one at a time. Every thread is a fiber; barriers, shuffles,
// clusters and asynchronous copies hold to CUDA's rules and say which one was broken; blocks and threads run in an order
// drawn anew for every launch: any, or each warp as far ahead of others as barriers let it. Shared memory is NaN before
// a block has written it.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;
constexpr size_t kCanary = 256;
constexpr unsigned char kCanaryByte = 0xab, kGarbage = 0xff;  // 0xff...: NaN in every floating-point type

enum class State { ready, at_block, at_warp, at_cluster, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Block;
struct Thread;
using Queue = std::vector<Thread*>;

struct Thread {
  uint3 index = {};
  Queue* queue = nullptr;  // where it waits for its turn
  Block* block = nullptr;
  int lane = 0, warp = 0;
  State state = State::done;
  unsigned mask = 0;
  // What the lane offers to a shuffle. Two places: a lane may be one shuffle ahead of another that has yet to read.
  uint64_t offered[2] = {};
  int turn = 0;
  uint64_t cluster_phase = 0;  // that it arrived for
  bool cluster_arrived = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;

  ucontext_t start;
  jmp_buf here;
  bool started = false;
  void* stack = nullptr;
};

struct Block {
  uint3 index = {};
  int rank = 0;
  std::vector<Thread*> threads;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int at_barrier = 0, done = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;  // kept from block to block, with their stacks
  std::vector<Block> blocks;                     // of the running cluster
  dim3 grid, block;
  std::function<void()> kernel;
  Thread* current = nullptr;
  jmp_buf scheduler;
  std::vector<Queue> ready;  // a later one has its turn where those before it are empty
  uint64_t cluster_phase = 0;
  int cluster_arrived = 0;
  std::string error;

  int capability = 90;    // of the device
  int architecture = 90;  // that its code was compiled for
  std::mt19937 random{0};
  std::map<const void*, int> shared_allowed;
  int launches = 0, largest_cluster = 0;
  std::recursive_mutex mutex;
};

inline Machine& machine() {
  static Machine* const instance = new Machine;
  return *instance;
}

inline void fail(const std::string& what) {
  Machine& m = machine();
  if (m.error.empty()) m.error = what;
}

// Back to the scheduler, until that picks this thread again.
inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.current->here) == 0) _longjmp(m.scheduler, 1);
}

inline void fiber() {
  for (;;) {
    machine().kernel();
    Machine& m = machine();
    Thread& t = *m.current;
    if (!t.open.empty() || !t.committed.empty()) fail("a thread ended with asynchronous copies it did not wait for");
    if (t.cluster_arrived) fail("a thread arrived at a cluster barrier and did not wait");
    t.state = State::done;
    ++t.block->done;
    yield();
  }
}

// Runs `thread` until it waits or ends.
inline void run(Thread& thread) {
  Machine& m = machine();
  m.current = &thread;
  if (_setjmp(m.scheduler) == 0) {
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber, 0);
    setcontext(&thread.start);
  }
}

inline void wake(Thread* thread) {
  thread->state = State::ready;
  thread->queue->push_back(thread);
}

inline void sync_block() {
  Machine& m = machine();
  Block& block = *m.current->block;
  m.current->state = State::at_block;
  if (++block.at_barrier == int(block.threads.size())) {
    block.at_barrier = 0;
    for (Thread* t : block.threads) wake(t);
  }
  yield();
}

inline void sync_warp(unsigned mask) {
  Machine& m = machine();
  Thread& self = *m.current;
  if (!(mask >> self.lane & 1u)) fail("a lane is not in the mask of its own warp-wide operation");
  self.state = State::at_warp;
  self.mask = mask;
  unsigned there = 0;
  const size_t first = size_t(self.warp) * kWarp;
  auto& threads = self.block->threads;
  for (size_t i = first; i < std::min(first + kWarp, threads.size()); ++i)
    if (threads[i]->state == State::at_warp) {
      if (threads[i]->mask != mask) fail("lanes of a warp wait with different masks");
      there |= 1u << (i - first);
    }
  if ((there & mask) == mask)
    for (size_t i = first; i < std::min(first + kWarp, threads.size()); ++i)
      if (mask >> (i - first) & 1u) wake(threads[i]);
  yield();
}

template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& self = *machine().current;
  const int turn = self.turn;
  memcpy(&self.offered[turn], &value, sizeof value);
  self.turn = 1 - turn;
  sync_warp(mask);
  if (source < 0 || source >= kWarp || !(mask >> source & 1u)) {
    fail("a shuffle reads a lane outside its mask");
    return value;
  }
  memcpy(&value, &self.block->threads[self.warp * kWarp + source]->offered[turn], sizeof value);
  return value;
}

inline int cluster_threads() {
  int count = 0;
  for (Block& block : machine().blocks) count += int(block.threads.size());
  return count;
}

inline void cluster_arrive() {
  Machine& m = machine();
  Thread& t = *m.current;
  if (t.cluster_arrived) fail("a thread arrived twice at a cluster barrier");
  t.cluster_arrived = true;
  t.cluster_phase = m.cluster_phase;
  if (++m.cluster_arrived == cluster_threads()) {
    m.cluster_arrived = 0;
    ++m.cluster_phase;
    for (Block& block : m.blocks)
      for (Thread* each : block.threads)
        if (each->state == State::at_cluster) wake(each);
  }
}

inline void cluster_wait() {
  Machine& m = machine();
  Thread& t = *m.current;
  if (!t.cluster_arrived) fail("a thread waits at a cluster barrier it did not arrive at");
  while (t.cluster_phase == m.cluster_phase) {
    t.state = State::at_cluster;
    yield();
  }
  t.cluster_arrived = false;
}

inline unsigned char* shared_memory() { return machine().current->block->shared; }

template <class T>
const T* of_rank(const T* address, int rank) {
  Machine& m = machine();
  const Block& own = *m.current->block;
  const ptrdiff_t offset = reinterpret_cast<const unsigned char*>(address) - own.shared;
  if (rank < 0 || rank >= int(m.blocks.size()) || offset < 0 || size_t(offset) >= own.shared_bytes) {
    fail("an address of another block's shared memory is out of range");
    return address;
  }
  const Block& other = m.blocks[rank];
  if (other.done == int(other.threads.size())) fail("the shared memory of a block that has ended was read");
  return reinterpret_cast<const T*>(other.shared + offset);
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    fail("an asynchronous copy is not aligned");
  machine().current->open.push_back({to, from, bytes});
}

inline void commit() {
  Thread& t = *machine().current;
  t.committed.push_back(std::move(t.open));
  t.open.clear();
}

// Copies happen as late as they may.
inline void wait_prior(size_t groups) {
  Thread& t = *machine().current;
  for (; t.committed.size() > groups; t.committed.pop_front())
    for (const Copy& copy : t.committed.front()) memcpy(copy.to, copy.from, copy.bytes);
}

inline Thread* fresh_thread(size_t number) {
  Machine& m = machine();
  while (m.threads.size() <= number) {
    m.threads.push_back(std::make_unique<Thread>());
    m.threads.back()->stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m.threads.back()->stack == MAP_FAILED) throw std::bad_alloc();
  }
  return m.threads[number].get();
}

// The blocks from `first` on that share a cluster.
inline void run_cluster(int64_t first, int size, int threads, size_t shared_bytes) {
  Machine& m = machine();
  m.blocks.resize(size);
  m.cluster_arrived = 0;
  // One queue for all, or one for each warp of the cluster.
  const int warps = (threads + kWarp - 1) / kWarp;
  m.ready.assign(m.random() % 2 ? size * warps : 1, {});
  std::vector<size_t> turns(m.ready.size());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = i;
  std::shuffle(turns.begin(), turns.end(), m.random);
  for (int rank = 0; rank < size; ++rank) {
    Block& block = m.blocks[rank];
    block.index = {unsigned(first + rank), 0, 0};
    block.rank = rank;
    block.at_barrier = block.done = 0;
    block.memory.assign(shared_bytes + 2 * kCanary + 128, kCanaryByte);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(block.memory.data()) + kCanary + 127) / 128 * 128;
    block.shared = reinterpret_cast<unsigned char*>(begin);
    block.shared_bytes = shared_bytes;
    memset(block.shared, kGarbage, shared_bytes);
    block.threads.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Thread* t = block.threads[i] = fresh_thread(size_t(rank) * threads + i);
      t->index = {unsigned(i), 0, 0};
      t->block = &block;
      t->lane = i % kWarp;
      t->warp = i / kWarp;
      t->queue = &m.ready[turns[(rank * warps + t->warp) % turns.size()]];
      t->turn = 0;
      t->cluster_arrived = false;
      wake(t);
    }
  }
  while (m.error.empty()) {
    const auto queue = std::find_if(m.ready.begin(), m.ready.end(), [](const Queue& q) { return !q.empty(); });
    if (queue == m.ready.end()) break;
    std::swap((*queue)[m.random() % queue->size()], queue->back());
    Thread* const next = queue->back();
    queue->pop_back();
    run(*next);
  }
  int counts[5] = {};
  for (Block& block : m.blocks) {
    for (Thread* t : block.threads) ++counts[int(t->state)];
    for (size_t i = 0; i < block.memory.size(); ++i) {
      const unsigned char* const byte = block.memory.data() + i;
      if ((byte < block.shared || byte >= block.shared + shared_bytes) && *byte != kCanaryByte)
        fail("a block wrote beyond its shared memory");
    }
  }
  if (counts[int(State::done)] != size * threads)
    fail("a barrier that not all threads reach: " + std::to_string(counts[1]) + " wait for their block, " +
         std::to_string(counts[2]) + " for their warp, " + std::to_string(counts[3]) + " for their cluster, " +
         std::to_string(counts[4]) + " have ended");
}

}  // namespace emulation
