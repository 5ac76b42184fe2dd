// geglu on the CPU: one pass over memory forward, one backward, row by row.
#include "geglu.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace rftcore::cpu {

using namespace geglu;

namespace {

// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kElementsPerThread = 65536;

template <class Stored, class T>
RFTCORE_SIMD void write_output(const Stored* u1, const Stored* u2, Stored* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = convert<Stored>(output(convert<T>(u1[i]), convert<T>(u2[i])));
}

template <class Stored, class T>
RFTCORE_SIMD void write_gradient(const Stored* u1, const Stored* u2, const Stored* grad_y, Stored* __restrict grad_u1,
                                 Stored* __restrict grad_u2, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto grad = gradient(convert<T>(u1[i]), convert<T>(u2[i]), convert<T>(grad_y[i]));
    grad_u1[i] = convert<Stored>(grad.u1);
    grad_u2[i] = convert<Stored>(grad.u2);
  }
}

template <class Function>
void for_rows(const Problem& p, int64_t threads, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, p.width));
  parallel_for(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

}  // namespace

void geglu_forward(const Forward& a, int64_t threads) {
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    for_rows(a, threads, [&](int64_t row) {
      const Stored* u = static_cast<const Stored*>(a.u) + row * 2 * a.width;
      write_output<Stored, maths_type<Stored, Stored>>(u, u + a.width, static_cast<Stored*>(a.y) + row * a.width,
                                                       a.width);
    });
  });
}

void geglu_backward(const Backward& a, int64_t threads) {
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    for_rows(a, threads, [&](int64_t row) {
      const Stored* u = static_cast<const Stored*>(a.u) + row * 2 * a.width;
      Stored* grad_u = static_cast<Stored*>(a.grad_u) + row * 2 * a.width;
      write_gradient<Stored, maths_type<Stored, Stored>>(
          u, u + a.width, static_cast<const Stored*>(a.grad_y) + row * a.width, grad_u, grad_u + a.width, a.width);
    });
  });
}

}  // namespace rftcore::cpu
