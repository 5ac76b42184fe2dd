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
#include "parallel.h"
#include "simd.h"
#include "wide.h"

namespace rftcore::cpu {

using namespace attention;

namespace {

// Queries that a tile of keys serves before the next tile comes, and its keys.
constexpr int64_t kGroup = 256, kTileKeys = 64;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kProductsPerThread = 4194304;
constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;
constexpr int64_t kLineBytes = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of neighbouring numbers, `stride` apart.
template <class T>
struct Rows {
  T* values;
  int64_t stride;

  Rows from(int64_t row) const { return {values + row * stride, stride}; }
};

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

// Vectors of `Bytes` bytes.
template <class T, int Bytes>
struct Vectors {
  using V = typename Lanes<T, Bytes>::type;
  static constexpr int kLanes = Bytes / int(sizeof(T));

  static RFTCORE_HOST_DEVICE V load(const T* from) {
    V lanes;
    memcpy(&lanes, from, Bytes);
    return lanes;
  }

  static RFTCORE_HOST_DEVICE void store(T* to, const V& lanes) { memcpy(to, &lanes, Bytes); }

  // The second where one is a NaN.
  static RFTCORE_HOST_DEVICE V larger(const V& a, const V& b) {
#if defined(__GNUC__)
    return a > b ? a : b;
#else
    V result;
    for (int i = 0; i < kLanes; ++i) result[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
#endif
  }

#if defined(RFTCORE_SHUFFLES)
  template <class To, class From>
  static RFTCORE_HOST_DEVICE To same_bits(const From& from) {
    To to;
    memcpy(&to, &from, Bytes);
    return to;
  }

  template <int Half, int... Lane>
  static RFTCORE_HOST_DEVICE void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
    const V first = __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane - Half : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane : Lane + Half)...);
    a = first;
  }

  // The quarters off the diagonal change places, and so on in each quarter.
  template <int Half = kLanes / 2>
  static RFTCORE_HOST_DEVICE void transpose(V (&rows)[kLanes]) {
    if constexpr (Half > 0) {
      for (int i = 0; i < kLanes; ++i)
        if (!(i & Half)) exchange<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes>());
      transpose<Half / 2>(rows);
    }
  }
#else
  static void transpose(V (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const T value = rows[i][j];
        rows[i][j] = rows[j][i], rows[j][i] = value;
      }
  }
#endif

  // For x that are at most a little above 0; 0 below -87.7, and relative to the result within 2e-7 + 1e-7 |x|.
  static RFTCORE_HOST_DEVICE V exponential(V x) {
#if defined(RFTCORE_SHUFFLES)
    if constexpr (std::is_same_v<T, float>) {
      x = larger(V{} - 127.0f, x * float(kLog2E));
      // Adding 1.5 * 2^23 rounds to an integer n, and with 127 more the sum ends in the exponent of 2^n.
      const float shift = 12582912.0f + 127.0f;
      const V shifted = x + shift;
      const V r = x - (shifted - shift);
      using Bits = typename Lanes<int32_t, Bytes>::type;
      const V power = same_bits<V>(same_bits<Bits>(shifted) << 23);
      // 2^r, fitted in the minimax sense to 9.2e-8, with 2^0 = 1: a maximum that stays scales sums by 1.
      V p = 1.32647272e-3f * r + 9.67151264e-3f;
      p = p * r + 5.55073374e-2f;
      p = p * r + 0.240222421f;
      p = p * r + 0.693146978f;
      p = p * r + 1.0f;
      return p * power;
    }
#endif
    for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
  }

  // Of normal numbers. A NaN stays one.
  static RFTCORE_HOST_DEVICE V logarithm(V x) {
#if defined(RFTCORE_SHUFFLES)
    if constexpr (std::is_same_v<T, float>) {
      // x = 2^n m, with m between the roots of 1/2 and 2, and log(m) = 2 artanh(u).
      using Bits = typename Lanes<int32_t, Bytes>::type;
      const Bits bits = same_bits<Bits>(x);
      const Bits n = (bits - 0x3f3504f3) >> 23;
      const V m = same_bits<V>(bits - (n << 23));
      const V u = (m - 1.0f) / (m + 1.0f), u2 = u * u;
      const V series = ((float(2.0 / 9) * u2 + float(2.0 / 7)) * u2 + float(2.0 / 5)) * u2 + float(2.0 / 3);
      return __builtin_convertvector(n, V) * float(kLn2) + (u * u2 * series + 2.0f * u) + (x - x);
    }
#endif
    for (int i = 0; i < kLanes; ++i) x[i] = std::log(x[i]);
    return x;
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
