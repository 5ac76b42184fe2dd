// Work shared by threads that live for one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace rftcore {

// Calls work(begin, end) on ranges that cover [0, count), on at most `threads` threads of at least `grain` items each.
// Threads are started per call, some 20 us each: no pool that a fork leaves dead, and no second OpenMP runtime beside
// PyTorch's. Small inputs stay on the calling thread. `work` must not throw.
template <class Work>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Work& work) {
  const int64_t shares = std::max<int64_t>(1, std::min(threads, count / grain));
  const auto share = [&](int64_t index) { work(count * index / shares, count * (index + 1) / shares); };
  std::vector<std::thread> helpers;
  helpers.reserve(shares - 1);
  int64_t started = 0;
  try {
    for (; started < shares - 1; ++started) helpers.emplace_back(share, started);
  } catch (const std::system_error&) {
    // No more threads to be had: the calling thread does the rest.
  }
  for (int64_t index = started; index < shares; ++index) share(index);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace rftcore
