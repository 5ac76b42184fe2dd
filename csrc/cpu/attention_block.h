// A block of queries, one in each lane: its scores with a tile of keys, what it adds to its output, and its gradients.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/attention.h"
#include "attention_lanes.h"

namespace rftcore::cpu::attention_tiles {

using namespace attention;

// Queries that a tile of keys serves before the next tile comes, and its keys.
constexpr int64_t kGroup = 256, kTileKeys = 64;
constexpr int64_t kLineBytes = 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of neighbouring numbers, `stride` apart.
template <class T>
struct Rows {
  T* values;
  int64_t stride;

  Rows from(int64_t row) const { return {values + row * stride, stride}; }
};

// Pieces of memory, each from a cache line on. Without memory it counts how much is needed.
template <class T>
class Scratch {
 public:
  explicit Scratch(T* memory) : memory_(memory) {}

  T* take(int64_t count) {
    T* const piece = memory_ ? memory_ + taken_ : nullptr;
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    taken_ += divide_up(count, kLine) * kLine;
    return piece;
  }

  int64_t taken() const { return taken_; }

 private:
  T* memory_;
  int64_t taken_ = 0;
};

template <class T>
struct ForwardMemory {
  Scratch<T> scratch;
  T *q, *o, *rows, *largest, *sum, *k, *v, *scores;

  ForwardMemory(const Forward& a, int64_t block, T* memory) : scratch(memory) {
    for (T** piece : {&q, &o, &rows}) *piece = scratch.take(kGroup * a.head_dim);
    for (T** piece : {&largest, &sum}) *piece = scratch.take(kGroup);
    for (T** piece : {&k, &v}) *piece = scratch.take(kTileKeys * a.head_dim);
    scores = scratch.take(kTileKeys * block);
  }
};

// `width`: of rows whose columns are computed with, in whole vectors.
template <class T>
struct BackwardMemory {
  Scratch<T> scratch;
  T *k, *v, *grad_k, *grad_v, *q, *grad_o, *grad_q, *rows, *q_rows, *grad_o_rows, *lse, *delta;
  T *probabilities, *grad_scores;

  BackwardMemory(const Backward& a, int64_t block, int64_t width, T* memory) : scratch(memory) {
    for (T** piece : {&k, &v}) *piece = scratch.take(a.keys * a.head_dim);
    for (T** piece : {&grad_k, &grad_v}) *piece = scratch.take(a.keys * width);
    for (T** piece : {&q, &grad_o, &grad_q, &rows}) *piece = scratch.take(kGroup * a.head_dim);
    for (T** piece : {&q_rows, &grad_o_rows}) *piece = scratch.take(kGroup * width);
    for (T** piece : {&lse, &delta}) *piece = scratch.take(kGroup);
    for (T** piece : {&probabilities, &grad_scores}) *piece = scratch.take(kTileKeys * block);
  }
};

// A block of as many queries as `Count` vectors have lanes. Matrices of it have kQueries columns.
template <class T, int Bytes, int Count>
struct Block : Vectors<T, Bytes> {
  using Base = Vectors<T, Bytes>;
  using V = typename Base::V;
  using Base::exponential, Base::kLanes, Base::larger, Base::load, Base::logarithm, Base::store, Base::transpose;
  static constexpr int64_t kQueries = Count * kLanes;
  // Vectors of sums in registers: AVX-512 has 32 of them, the others 16.
  static constexpr int kSums = Bytes == 64 ? 16 : 8;

  // Calls function(first, count) on runs of kLanes columns, the last of which may overlap the one before it.
  template <class Function>
  static RFTCORE_HOST_DEVICE void for_columns(int64_t columns, const Function& function) {
    if (columns < kLanes) return function(0, columns);
    for (int64_t column = 0; column < columns; column += kLanes)
      function(column < columns - kLanes ? column : columns - kLanes, kLanes);
  }

  // to (columns, kQueries) = factor from^T; rows that are not there are zeros.
  static RFTCORE_HOST_DEVICE void to_lanes(Rows<const T> from, int64_t rows, int64_t columns, T factor, T* to) {
    for (int64_t row = 0; row < kQueries; row += kLanes)
      for_columns(columns, [&](int64_t first, int64_t count) RFTCORE_INLINE_LAMBDA {
        V square[kLanes] = {};
        for (int i = 0; i < kLanes; ++i)
          if (row + i < rows) {
            const T* const values = from.values + (row + i) * from.stride + first;
            if (count == kLanes)
              square[i] = load(values);
            else
              memcpy(&square[i], values, count * sizeof(T));
          }
        transpose(square);
        for (int i = 0; i < kLanes; ++i)
          if (i < count) store(to + (first + i) * kQueries + row, factor * square[i]);
      });
  }

  // to (rows, columns) = (from factors)^T, for from (columns, kQueries).
  static RFTCORE_HOST_DEVICE void from_lanes(const T* from, const V (&factors)[Count], int64_t rows, int64_t columns,
                                             Rows<T> to) {
    for (int v = 0; v < Count; ++v)
      for_columns(columns, [&](int64_t first, int64_t count) RFTCORE_INLINE_LAMBDA {
        V square[kLanes] = {};
        for (int i = 0; i < kLanes; ++i)
          if (i < count) square[i] = load(from + (first + i) * kQueries + v * kLanes) * factors[v];
        transpose(square);
        for (int i = 0; i < kLanes; ++i)
          if (v * kLanes + i < rows) {
            T* const values = to.values + (v * kLanes + i) * to.stride + first;
            if (count == kLanes)
              store(values, square[i]);
            else
              memcpy(values, &square[i], count * sizeof(T));
          }
      });
  }

  // A matrix whose element (row, column) lies at values[row * row_stride + column * column_stride].
  struct Left {
    const T* values;
    int64_t row_stride, column_stride;
  };

  // Calls write(row, vector, lanes) with left times `Columns` vectors of right's columns, for `Rows` rows.
  template <int Rows, int Columns, class Write>
  static RFTCORE_HOST_DEVICE void multiply(Left left, const T* right, int64_t right_stride, int64_t depth,
                                           const Write& write) {
    V sums[Rows][Columns] = {}, factors[Columns];
    for (int64_t k = 0; k < depth; ++k) {
      for (int v = 0; v < Columns; ++v) factors[v] = load(right + k * right_stride + v * kLanes);
      for (int i = 0; i < Rows; ++i) {
        const T factor = left.values[i * left.row_stride + k * left.column_stride];
        for (int v = 0; v < Columns; ++v) sums[i][v] += factor * factors[v];
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Columns; ++v) write(i, v, sums[i][v]);
  }

  // Calls function(rows, first) on runs of `Most` rows, then of half as many, and so on; constants.
  template <int Most, class Function>
  static RFTCORE_HOST_DEVICE void for_rows(int64_t first, int64_t count, const Function& function) {
    for (; first + Most <= count; first += Most) function(std::integral_constant<int, Most>(), first);
    if constexpr (Most > 1) for_rows<Most / 2>(first, count, function);
  }

  // Calls write(row, vector, lanes) with left (count, depth) times right (depth, kQueries).
  template <class Write>
  static RFTCORE_HOST_DEVICE void for_products(Left left, int64_t count, const T* right, int64_t depth,
                                               const Write& write) {
    for_rows<kSums / Count>(0, count, [&](auto rows, int64_t first) RFTCORE_INLINE_LAMBDA {
      multiply<decltype(rows)::value, Count>(
          Left{left.values + first * left.row_stride, left.row_stride, left.column_stride}, right, kQueries, depth,
          [&](int row, int v, const V& lanes) RFTCORE_INLINE_LAMBDA { write(first + row, v, lanes); });
    });
  }

  // o (head_dim, kQueries), of exp(score - largest), the largest score and the sum: with a tile of keys added.
  // q: (head_dim, kQueries), scaled; k, v: (keys, head_dim).
  static RFTCORE_HOST_DEVICE void add_tile(const T* q, const T* k, const T* v, int64_t keys, int64_t head_dim,
                                           T* scores, T* o, T* largest, T* sum) {
    V top[Count], keep[Count], added[Count] = {};
    for (int i = 0; i < Count; ++i) top[i] = load(largest + i * kLanes);
    for_products(Left{k, head_dim, 1}, keys, q, head_dim, [&](int64_t key, int i, const V& score)
                                                              RFTCORE_INLINE_LAMBDA {
      top[i] = larger(top[i], score);
      store(scores + key * kQueries + i * kLanes, score);
    });
    for (int i = 0; i < Count; ++i) {
      keep[i] = exponential(load(largest + i * kLanes) - top[i]);
      store(largest + i * kLanes, top[i]);
    }
    for (int64_t key = 0; key < keys; ++key)
      for (int i = 0; i < Count; ++i) {
        T* const at = scores + key * kQueries + i * kLanes;
        const V probability = exponential(load(at) - top[i]);
        added[i] += probability;
        store(at, probability);
      }
    for (int i = 0; i < Count; ++i) store(sum + i * kLanes, load(sum + i * kLanes) * keep[i] + added[i]);
    for_products(Left{v, 1, head_dim}, head_dim, scores, keys, [&](int64_t column, int i, const V& values)
                                                                   RFTCORE_INLINE_LAMBDA {
      T* const at = o + column * kQueries + i * kLanes;
      store(at, load(at) * keep[i] + values);
    });
  }

  // What add_tile left: o divided by the sum, to rows, and the log-sum-exp, in place of the sum.
  static RFTCORE_HOST_DEVICE void finish(const T* o, const T* largest, T* sum, int64_t rows, int64_t head_dim,
                                         Rows<T> to) {
    V inverse[Count];
    for (int i = 0; i < Count; ++i) {
      const V total = load(sum + i * kLanes);
      inverse[i] = T(1) / total;
      store(sum + i * kLanes, load(largest + i * kLanes) + logarithm(total));
    }
    from_lanes(o, inverse, rows, head_dim, to);
  }

  // What differentiate_tile left, scaled, to rows.
  static RFTCORE_HOST_DEVICE void finish_gradient(const T* grad_q, T scale, int64_t rows, int64_t head_dim,
                                                  Rows<T> to) {
    V factors[Count];
    for (int i = 0; i < Count; ++i) factors[i] = V{} + scale;
    from_lanes(grad_q, factors, rows, head_dim, to);
  }

  // sums (rows, width) += weights (rows, kQueries) right (kQueries, width), `Columns` vectors of columns at a time and
  // then fewer.
  template <int Columns = Bytes == 64 ? 4 : 2>
  static RFTCORE_HOST_DEVICE void add_products(const T* weights, int64_t rows, const T* right, int64_t width, T* sums,
                                               int64_t column = 0) {
    constexpr int kRows = kSums / (Columns == 3 ? 4 : Columns);
    for (; column + Columns * kLanes <= width; column += Columns * kLanes)
      for_rows<kRows>(0, rows, [&](auto count, int64_t first) RFTCORE_INLINE_LAMBDA {
        multiply<decltype(count)::value, Columns>(
            Left{weights + first * kQueries, kQueries, 1}, right + column, width, kQueries,
            [&](int row, int v, const V& lanes) RFTCORE_INLINE_LAMBDA {
              T* const at = sums + (first + row) * width + column + v * kLanes;
              store(at, load(at) + lanes);
            });
      });
    if constexpr (Columns > 1) add_products<Columns - 1>(weights, rows, right, width, sums, column);
  }

  // delta (kQueries) = the sums of a b over columns, for a and b (columns, kQueries).
  static RFTCORE_HOST_DEVICE void dot(const T* a, const T* b, int64_t columns, T* delta) {
    for (int i = 0; i < Count; ++i) {
      V sum = {};
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t at = column * kQueries + i * kLanes;
        sum += load(a + at) * load(b + at);
      }
      store(delta + i * kLanes, sum);
    }
  }

  // Adds what a tile of keys gives: to grad_q (head_dim, kQueries), and to grad_k and grad_v (keys, width), each where
  // not null. k, v: (keys, head_dim). Gradients of scores are not scaled. m's block of queries begins at `first`.
  static RFTCORE_HOST_DEVICE void differentiate_tile(const BackwardMemory<T>& m, int64_t first, const T* k, const T* v,
                                                     int64_t keys, int64_t head_dim, int64_t width, T* grad_q,
                                                     T* grad_k, T* grad_v) {
    V lse[Count], delta[Count];
    for (int i = 0; i < Count; ++i) {
      lse[i] = load(m.lse + first + i * kLanes);
      delta[i] = load(m.delta + first + i * kLanes);
    }
    for_products(Left{k, head_dim, 1}, keys, m.q + first * head_dim, head_dim,
                 [&](int64_t key, int i, const V& score) RFTCORE_INLINE_LAMBDA {
      store(m.probabilities + key * kQueries + i * kLanes, exponential(score - lse[i]));
    });
    if (grad_v) add_products(m.probabilities, keys, m.grad_o_rows + first * width, width, grad_v);
    if (!grad_q && !grad_k) return;
    for_products(Left{v, head_dim, 1}, keys, m.grad_o + first * head_dim, head_dim,
                 [&](int64_t key, int i, const V& grad) RFTCORE_INLINE_LAMBDA {
      const int64_t at = key * kQueries + i * kLanes;
      store(m.grad_scores + at, load(m.probabilities + at) * (grad - delta[i]));
    });
    if (grad_k) add_products(m.grad_scores, keys, m.q_rows + first * width, width, grad_k);
    if (!grad_q) return;
    for_products(Left{k, 1, head_dim}, head_dim, m.grad_scores, keys,
                 [&](int64_t column, int i, const V& grad) RFTCORE_INLINE_LAMBDA {
      T* const at = grad_q + column * kQueries + i * kLanes;
      store(at, load(at) + grad);
    });
  }
};

}  // namespace rftcore::cpu::attention_tiles
