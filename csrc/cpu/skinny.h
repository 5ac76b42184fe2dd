// Products with a skinny matrix of the ranks of adapters, in tiles that stay in registers: of many rows by few ranks, of
// few ranks by many columns, and the sums over rows of their outer products.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../common/host_device.h"
#include "wide.h"

namespace rftcore::cpu::skinny {

// Rows that a tile of sums takes at once.
constexpr int64_t kTileRows = 4;

// Vectors of `Bytes` bytes. Those that matrices of other sizes leave over are loaded and stored in part.
template <class T, int Bytes>
struct Vectors {
  using V = typename Lanes<T, Bytes>::type;
  static constexpr int kLanes = Bytes / int(sizeof(T));

  // The first `count` lanes, zero in the others; all of them where `Full`.
  template <bool Full>
  static RFTCORE_HOST_DEVICE void load(V& lanes, const T* from, int64_t count) {
    if constexpr (!Full) lanes = V{};
    memcpy(&lanes, from, Full ? Bytes : count * sizeof(T));
  }

  template <bool Full>
  static RFTCORE_HOST_DEVICE void store(const V& lanes, T* to, int64_t count) {
    memcpy(to, &lanes, Full ? Bytes : count * sizeof(T));
  }

  // Pairwise.
  static RFTCORE_HOST_DEVICE T total(const V& lanes) {
    T values[kLanes];
    memcpy(values, &lanes, Bytes);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
  }

#if defined(RFTCORE_SHUFFLES)
  // Where lane `lane` of a fold, below, has its first addend, counted through both vectors; the second is Half further.
  template <int Half>
  static constexpr int source(int lane) {
    return lane / Half * 2 * Half + lane % Half;
  }

  // a holds sums of groups of 2 Half lanes each, and so does b: sums of groups of Half lanes, a's and then b's.
  template <int Half, int... Lane>
  static RFTCORE_HOST_DEVICE void fold(V& a, const V& b, std::integer_sequence<int, Lane...>) {
    a = __builtin_shufflevector(a, b, source<Half>(Lane)...) +
        __builtin_shufflevector(a, b, (source<Half>(Lane) + Half)...);
  }

  // The totals of as many vectors as one has lanes, in the first of them: 3 operations a vector instead of 10.
  template <int Half = kLanes / 2>
  static RFTCORE_HOST_DEVICE void totals(V* vectors) {
    if constexpr (Half > 0) {
      for (int i = 0; i < Half; ++i)
        fold<Half>(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, kLanes>());
      for (int i = 1; i < Half; ++i) vectors[i] = vectors[2 * i];
      totals<Half / 2>(vectors);
    }
  }
#endif

  // `rows` rows of `bytes` bytes, into the first-level cache: hardware follows one row, and here four are read at once.
  static RFTCORE_HOST_DEVICE void prefetch(const T* from, int64_t stride, int rows, int bytes) {
#if defined(__GNUC__)
    constexpr int kLine = 64;
    for (int i = 0; i < rows; ++i)
      for (int byte = 0; byte < bytes; byte += kLine) __builtin_prefetch(from + i * stride + byte / int(sizeof(T)));
#endif
  }

  // A matrix whose element (row, column) lies at values[row * row_stride + column * column_stride].
  struct Left {
    const T* values;
    int64_t row_stride, column_stride;
  };

  // sums += left right, for `Rows` rows of left and `Count` vectors of neighbouring columns.
  template <int Rows, int Count, bool Full>
  static RFTCORE_HOST_DEVICE void add_tile(Left left, const T* right, int64_t right_stride, int64_t depth, T* sums,
                                           int64_t stride, int64_t count) {
    V tile[Rows][Count], factors[Count];
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Count; ++v) load<Full>(tile[i][v], sums + i * stride + v * kLanes, count);
    for (int64_t k = 0; k < depth; ++k) {
      for (int v = 0; v < Count; ++v) load<Full>(factors[v], right + k * right_stride + v * kLanes, count);
      for (int i = 0; i < Rows; ++i) {
        const T factor = left.values[i * left.row_stride + k * left.column_stride];
        for (int v = 0; v < Count; ++v) tile[i][v] += factor * factors[v];
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Count; ++v) store<Full>(tile[i][v], sums + i * stride + v * kLanes, count);
  }

  // For at most kTileRows rows.
  template <int Count, bool Full>
  static RFTCORE_HOST_DEVICE void add_rows(Left left, int64_t rows, const T* right, int64_t right_stride,
                                           int64_t depth, T* sums, int64_t stride, int64_t count) {
    switch (rows) {
      case 1: return add_tile<1, Count, Full>(left, right, right_stride, depth, sums, stride, count);
      case 2: return add_tile<2, Count, Full>(left, right, right_stride, depth, sums, stride, count);
      case 3: return add_tile<3, Count, Full>(left, right, right_stride, depth, sums, stride, count);
      default: return add_tile<kTileRows, Count, Full>(left, right, right_stride, depth, sums, stride, count);
    }
  }

  // y (rows, columns) += h (rows, ranks) p (ranks, columns): row after row of y, which comes from far.
  static RFTCORE_HOST_DEVICE void expand(const T* h, int64_t h_stride, int64_t rows, const T* p, int64_t ranks,
                                         int64_t columns, T* y) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Left left{h + row * h_stride, h_stride, 1};
      const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
      T* sums = y + row * columns;
      int64_t c = 0;
      for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
        prefetch(sums + kTileRows * columns + c, columns, kTileRows, 2 * Bytes);
        add_rows<2, true>(left, count, p + c, columns, ranks, sums + c, columns, 0);
      }
      for (; c + kLanes <= columns; c += kLanes)
        add_rows<1, true>(left, count, p + c, columns, ranks, sums + c, columns, 0);
      if (c < columns) add_rows<1, false>(left, count, p + c, columns, ranks, sums + c, columns, columns - c);
    }
  }

  template <int Count, bool Full>
  static RFTCORE_HOST_DEVICE void add_outer_columns(const T* h, int64_t h_stride, int64_t rows, const T* x,
                                                    int64_t ranks, int64_t columns, T* sums, int64_t count) {
    for (int64_t rank = 0; rank < ranks; rank += kTileRows)
      add_rows<Count, Full>(Left{h + rank, 1, h_stride}, ranks - rank < kTileRows ? ranks - rank : kTileRows, x,
                            columns, rows, sums + rank * columns, columns, count);
  }

  // sums (ranks, columns) += h^T x, for h (rows, ranks) and x (rows, columns): columns of x, which is near.
  static RFTCORE_HOST_DEVICE void add_outer(const T* h, int64_t h_stride, int64_t rows, const T* x, int64_t ranks,
                                            int64_t columns, T* sums) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
      add_outer_columns<2, true>(h, h_stride, rows, x + c, ranks, columns, sums + c, 0);
    for (; c + kLanes <= columns; c += kLanes)
      add_outer_columns<1, true>(h, h_stride, rows, x + c, ranks, columns, sums + c, 0);
    if (c < columns) add_outer_columns<1, false>(h, h_stride, rows, x + c, ranks, columns, sums + c, columns - c);
  }

  template <int Rows, int Ranks, bool First>
  static RFTCORE_HOST_DEVICE void multiply_tile(const T* x, const T* p, int64_t depth, T* h, int64_t h_stride) {
    V tile[Rows * Ranks] = {}, left, right[Ranks];
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      if (First) prefetch(x + Rows * depth + k, depth, Rows, Bytes);
      for (int j = 0; j < Ranks; ++j) load<true>(right[j], p + j * depth + k, 0);
      for (int i = 0; i < Rows; ++i) {
        load<true>(left, x + i * depth + k, 0);
        for (int j = 0; j < Ranks; ++j) tile[i * Ranks + j] += left * right[j];
      }
    }
    if (k < depth) {
      for (int j = 0; j < Ranks; ++j) load<false>(right[j], p + j * depth + k, depth - k);
      for (int i = 0; i < Rows; ++i) {
        load<false>(left, x + i * depth + k, depth - k);
        for (int j = 0; j < Ranks; ++j) tile[i * Ranks + j] += left * right[j];
      }
    }
#if defined(RFTCORE_SHUFFLES)
    if constexpr (Rows * Ranks % kLanes == 0 && kLanes % Ranks == 0) {
      constexpr int kRows = kLanes / Ranks;  // whose totals fill a vector
      for (int row = 0; row < Rows; row += kRows) {
        totals(tile + row * Ranks);
        T values[kLanes];
        memcpy(values, tile + row * Ranks, Bytes);
        for (int i = 0; i < kRows; ++i) memcpy(h + (row + i) * h_stride, values + i * Ranks, Ranks * sizeof(T));
      }
      return;
    }
#endif
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Ranks; ++j) h[i * h_stride + j] = total(tile[i * Ranks + j]);
  }

  template <int Rows>
  static RFTCORE_HOST_DEVICE void multiply_rows(const T* x, const T* p, int64_t ranks, int64_t depth, T* h,
                                                int64_t h_stride) {
    // AVX-512 has 32 registers, the others 16 or fewer.
    constexpr int kRanks = Bytes == 64 ? 4 : 2;
    int64_t rank = 0;
    if (ranks >= kRanks) multiply_tile<Rows, kRanks, true>(x, p, depth, h, h_stride), rank = kRanks;
    for (; rank + kRanks <= ranks; rank += kRanks)
      multiply_tile<Rows, kRanks, false>(x, p + rank * depth, depth, h + rank, h_stride);
    for (; rank < ranks; ++rank) multiply_tile<Rows, 1, false>(x, p + rank * depth, depth, h + rank, h_stride);
  }

  // h (rows, ranks) = x (rows, depth) p^T, for p (ranks, depth).
  static RFTCORE_HOST_DEVICE void shrink(const T* x, int64_t rows, const T* p, int64_t ranks, int64_t depth, T* h,
                                         int64_t h_stride) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows)
      multiply_rows<kTileRows>(x + row * depth, p, ranks, depth, h + row * h_stride, h_stride);
    for (; row < rows; ++row) multiply_rows<1>(x + row * depth, p, ranks, depth, h + row * h_stride, h_stride);
  }
};

template <class T>
void expand(const T* h, int64_t h_stride, int64_t rows, const T* p, int64_t ranks, int64_t columns, T* y) {
  at_best_width([&](auto bytes) RFTCORE_INLINE_LAMBDA {
    Vectors<T, decltype(bytes)::value>::expand(h, h_stride, rows, p, ranks, columns, y);
  });
}

template <class T>
void add_outer(const T* h, int64_t h_stride, int64_t rows, const T* x, int64_t ranks, int64_t columns, T* sums) {
  at_best_width([&](auto bytes) RFTCORE_INLINE_LAMBDA {
    Vectors<T, decltype(bytes)::value>::add_outer(h, h_stride, rows, x, ranks, columns, sums);
  });
}

template <class T>
void shrink(const T* x, int64_t rows, const T* p, int64_t ranks, int64_t depth, T* h, int64_t h_stride) {
  at_best_width([&](auto bytes) RFTCORE_INLINE_LAMBDA {
    Vectors<T, decltype(bytes)::value>::shrink(x, rows, p, ranks, depth, h, h_stride);
  });
}

}  // namespace rftcore::cpu::skinny
