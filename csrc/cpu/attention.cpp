// attention on the CPU. Queries lie side by side in the lanes of vectors, keys and columns are broadcast to them: no
// maximum and no sum goes across lanes, and neither few keys nor an odd head dimension leave lanes empty. A tile of
// scores stays in the first-level cache. What is computed for a query depends on nothing but it and all keys and
// values; gradients of keys and values are summed in an order that does not depend on the number of threads. Queries
// are scaled, not scores: a score that is the whole log-sum-exp equals it, however large it is.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "../common/dtypes.h"
#include "../common/host_device.h"
#include "attention_block.h"
#include "parallel.h"
#include "simd.h"
#include "wide.h"

namespace rftcore::cpu {

using namespace attention;
using namespace attention_tiles;

namespace {

// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kProductsPerThread = 4194304;

template <class Stored, class T>
RFTCORE_SIMD void read(const Stored* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                       T* __restrict to, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
#if defined(__GNUC__)
    // Hardware does not follow rows this short, with those of other heads between them.
    for (int64_t i = 0; i < columns; i += kLineBytes / sizeof(Stored))
      __builtin_prefetch(from + (row + 16) * row_stride + i);
#endif
    if (column_stride == 1)
      for (int64_t i = 0; i < columns; ++i) to[row * stride + i] = convert<T>(from[row * row_stride + i]);
    else
      for (int64_t i = 0; i < columns; ++i)
        to[row * stride + i] = convert<T>(from[row * row_stride + i * column_stride]);
  }
}

template <class Stored, class T>
RFTCORE_SIMD void write(const T* from, int64_t stride, int64_t rows, int64_t columns, Stored* __restrict to,
                        int64_t row_stride, int64_t column_stride) {
  for (int64_t row = 0; row < rows; ++row)
    if (column_stride == 1)
      for (int64_t i = 0; i < columns; ++i) to[row * row_stride + i] = convert<Stored>(from[row * stride + i]);
    else
      for (int64_t i = 0; i < columns; ++i)
        to[row * row_stride + i * column_stride] = convert<Stored>(from[row * stride + i]);
}

// The tokens of one head.
template <class T>
class Head {
 public:
  Head(const Problem& p, const Heads& heads, int64_t index)
      : dtype_(p.dtype), columns_(p.head_dim), heads_(heads),
        offset_(index / p.heads * heads.batch_stride + index % p.heads * heads.head_stride) {}

  void copy_to(T* to, int64_t stride, int64_t token, int64_t count) const {
    with_dtype(dtype_, [&](auto stored) {
      read(static_cast<const decltype(stored)*>(heads_.values) + at(token), heads_.token_stride,
           heads_.column_stride, count, columns_, to, stride);
    });
  }

  void copy_from(const T* from, int64_t stride, int64_t token, int64_t count) const {
    with_dtype(dtype_, [&](auto stored) {
      write(from, stride, count, columns_, static_cast<decltype(stored)*>(heads_.values) + at(token),
            heads_.token_stride, heads_.column_stride);
    });
  }

  // As they lie, or copied to a buffer.
  Rows<const T> to_read(int64_t token, int64_t count, T* buffer) const {
    if (!is_plain()) copy_to(buffer, columns_, token, count);
    const Rows<T> rows = to_write(token, buffer);
    return {rows.values, rows.stride};
  }

  // Where they lie, or a buffer for `finish`.
  Rows<T> to_write(int64_t token, T* buffer) const {
    if (is_plain()) return {static_cast<T*>(heads_.values) + at(token), heads_.token_stride};
    return {buffer, columns_};
  }

  void finish(int64_t token, int64_t count, const T* buffer) const {
    if (!is_plain()) copy_from(buffer, columns_, token, count);
  }

 private:
  bool is_plain() const { return dtype_ == (std::is_same_v<T, double> ? 0 : 1) && heads_.column_stride == 1; }
  int64_t at(int64_t token) const { return offset_ + token * heads_.token_stride; }

  int dtype_;
  int64_t columns_;
  const Heads& heads_;
  int64_t offset_;
};

template <class T, int Bytes>
struct Kernel {
  // fp64 is for checks, and 16 bytes for processors without AVX: not worth the time to compile wide blocks.
  static constexpr int kVectors = std::is_same_v<T, float> ? Bytes / 16 : 1;
  using Wide = Block<T, Bytes, kVectors>;
  using Narrow = Block<T, Bytes, 1>;

  // Calls function(block, first) on blocks that cover [0, queries): narrow ones for what would leave a vector empty.
  template <class Function>
  static RFTCORE_HOST_DEVICE void for_blocks(int64_t queries, const Function& function) {
    int64_t first = 0;
    if constexpr (kVectors > 1)
      for (; first + Wide::kQueries - Narrow::kQueries < queries; first += Wide::kQueries) function(Wide(), first);
    for (; first < queries; first += Narrow::kQueries) function(Narrow(), first);
  }

  // Calls function(first, count) on the tiles of keys, all about as large.
  template <class Function>
  static RFTCORE_HOST_DEVICE void for_tiles(int64_t keys, const Function& function) {
    const int64_t tiles = divide_up(keys, kTileKeys);
    for (int64_t tile = 0; tile < tiles; ++tile)
      function(keys * tile / tiles, keys * (tile + 1) / tiles - keys * tile / tiles);
  }

  static ForwardMemory<T> forward_memory(const Forward& a, T* memory) { return {a, Wide::kQueries, memory}; }

  // Groups of queries [begin, end), counted through all heads.
  static RFTCORE_HOST_DEVICE void forward(const Forward& a, int64_t begin, int64_t end, T* memory) {
    const int64_t d = a.head_dim, groups = divide_up(a.queries, kGroup);
    const ForwardMemory<T> m = forward_memory(a, memory);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t index = group / groups, first = group % groups * kGroup;
      const int64_t queries = std::min(kGroup, a.queries - first);
      const Head<T> k(a, a.k, index), v(a, a.v, index), o(a, a.o, index);
      const Rows<const T> from = Head<T>(a, a.q, index).to_read(first, queries, m.rows);
      for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
        block.to_lanes(from.from(i), queries - i, d, T(a.scale), m.q + i * d);
      });
      std::fill_n(m.o, kGroup * d, T(0));
      std::fill_n(m.sum, kGroup, T(0));
      std::fill_n(m.largest, kGroup, std::numeric_limits<T>::lowest());
      for_tiles(a.keys, [&](int64_t key, int64_t keys) RFTCORE_INLINE_LAMBDA {
        k.copy_to(m.k, d, key, keys);
        v.copy_to(m.v, d, key, keys);
        for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
          block.add_tile(m.q + i * d, m.k, m.v, keys, d, m.scores, m.o + i * d, m.largest + i, m.sum + i);
        });
      });
      const Rows<T> to = o.to_write(first, m.rows);
      for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
        block.finish(m.o + i * d, m.largest + i, m.sum + i, queries - i, d, to.from(i));
      });
      o.finish(first, queries, m.rows);
      std::copy_n(m.sum, queries, static_cast<T*>(a.lse) + index * a.queries + first);
    }
  }

  static int64_t width_of(const Problem& p) { return divide_up(p.head_dim, Wide::kLanes) * Wide::kLanes; }

  static BackwardMemory<T> backward_memory(const Backward& a, T* memory) {
    return {a, Wide::kQueries, width_of(a), memory};
  }

  // Heads [begin, end).
  static RFTCORE_HOST_DEVICE void backward(const Backward& a, int64_t begin, int64_t end, T* memory) {
    const int64_t d = a.head_dim, width = width_of(a);
    const BackwardMemory<T> m = backward_memory(a, memory);
    for (int64_t index = begin; index < end; ++index) {
      const Head<T> q(a, a.q, index), o(a, a.o, index), grad_o(a, a.grad_o, index), grad_q(a, a.grad_q, index);
      Head<T>(a, a.k, index).copy_to(m.k, d, 0, a.keys);
      Head<T>(a, a.v, index).copy_to(m.v, d, 0, a.keys);
      std::fill_n(m.grad_k, a.keys * width, T(0));
      std::fill_n(m.grad_v, a.keys * width, T(0));
      for (int64_t first = 0; first < a.queries; first += kGroup) {
        const int64_t queries = std::min(kGroup, a.queries - first);
        const T* const lse = static_cast<const T*>(a.lse) + index * a.queries + first;
        std::fill_n(m.q_rows, kGroup * width, T(0));
        std::fill_n(m.grad_o_rows, kGroup * width, T(0));
        q.copy_to(m.q_rows, width, first, queries);
        grad_o.copy_to(m.grad_o_rows, width, first, queries);
        for (int64_t i = 0; i < kGroup; ++i) m.lse[i] = i < queries ? lse[i] : T(0);
        const Rows<const T> o_rows = o.to_read(first, queries, m.rows);
        for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
          block.to_lanes({m.q_rows + i * width, width}, block.kQueries, d, T(a.scale), m.q + i * d);
          block.to_lanes({m.grad_o_rows + i * width, width}, block.kQueries, d, T(1), m.grad_o + i * d);
          T* const o_lanes = m.grad_q + i * d;  // for now
          block.to_lanes(o_rows.from(i), queries - i, d, T(1), o_lanes);
          block.dot(m.grad_o + i * d, o_lanes, d, m.delta + i);
        });
        std::fill_n(m.grad_q, kGroup * d, T(0));
        for_tiles(a.keys, [&](int64_t key, int64_t keys) RFTCORE_INLINE_LAMBDA {
          for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
            block.differentiate_tile(m, i, m.k + key * d, m.v + key * d, keys, d, width,
                                     a.grad_q ? m.grad_q + i * d : nullptr, a.grad_k ? m.grad_k + key * width : nullptr,
                                     a.grad_v ? m.grad_v + key * width : nullptr);
          });
        });
        if (!a.grad_q) continue;
        const Rows<T> to = grad_q.to_write(first, m.rows);
        for_blocks(queries, [&](auto block, int64_t i) RFTCORE_INLINE_LAMBDA {
          block.finish_gradient(m.grad_q + i * d, T(a.scale), queries - i, d, to.from(i));
        });
        grad_q.finish(first, queries, m.rows);
      }
      for (int64_t i = 0; i < a.keys * width; ++i) m.grad_k[i] *= T(a.scale);
      if (a.grad_k) Head<T>(a, a.grad_k, index).copy_from(m.grad_k, width, 0, a.keys);
      if (a.grad_v) Head<T>(a, a.grad_v, index).copy_from(m.grad_v, width, 0, a.keys);
    }
  }
};

// Calls function(begin, end, memory) on ranges that cover [0, count), each with memory of its own for `size` numbers,
// from a cache line on. Each unit of count costs `products`.
template <class T, class Function>
void share_out(int64_t count, int64_t products, int64_t threads, int64_t size, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products));
  const int64_t shares = std::max<int64_t>(1, std::min(threads, count / grain));
  const std::unique_ptr<T[]> memory(new T[shares * size + kLineBytes / sizeof(T)]);
  const int64_t over = reinterpret_cast<uintptr_t>(memory.get()) % kLineBytes / sizeof(T);
  T* const first = memory.get() + (kLineBytes / sizeof(T) - over);
  parallel_for(shares, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(count * i / shares, count * (i + 1) / shares, first + i * size);
  });
}

template <class T>
void forward_as(const Forward& a, int64_t threads) {
  int64_t size = 0;
  at_best_width([&](auto bytes) {
    size = Kernel<T, decltype(bytes)::value>::forward_memory(a, nullptr).scratch.taken();
  });
  share_out<T>(a.batch * a.heads * divide_up(a.queries, kGroup),
               2 * std::min(a.queries, kGroup) * a.keys * a.head_dim, threads, size,
               [&](int64_t begin, int64_t end, T* memory) {
    at_best_width([&](auto bytes) RFTCORE_INLINE_LAMBDA {
      Kernel<T, decltype(bytes)::value>::forward(a, begin, end, memory);
    });
  });
}

template <class T>
void backward_as(const Backward& a, int64_t threads) {
  int64_t size = 0;
  at_best_width([&](auto bytes) {
    size = Kernel<T, decltype(bytes)::value>::backward_memory(a, nullptr).scratch.taken();
  });
  share_out<T>(a.batch * a.heads, 5 * a.queries * a.keys * a.head_dim, threads, size,
               [&](int64_t begin, int64_t end, T* memory) {
    at_best_width([&](auto bytes) RFTCORE_INLINE_LAMBDA {
      Kernel<T, decltype(bytes)::value>::backward(a, begin, end, memory);
    });
  });
}

}  // namespace

void attention_forward(const Forward& arguments, int64_t threads) {
  arguments.dtype == 0 ? forward_as<double>(arguments, threads) : forward_as<float>(arguments, threads);
}

void attention_backward(const Backward& arguments, int64_t threads) {
  arguments.dtype == 0 ? backward_as<double>(arguments, threads) : backward_as<float>(arguments, threads);
}

}  // namespace rftcore::cpu
