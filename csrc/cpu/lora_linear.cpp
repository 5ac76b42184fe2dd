// lora_linear on the CPU: n, each output and each gradient come from memory once, in strips of rows that stay in the
// second-level cache, and all that adapters make of a strip is made while it is there. Gradients of a and b are summed
// per block of rows and added in an order that does not depend on the number of threads.
#include "lora_linear.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace rftcore::cpu {

using namespace lora_linear;

namespace {

constexpr int64_t kStripRows = 32, kTileRows = 4;
// Blocks of the sums of gradients: at most so many, of at least so many rows.
constexpr int64_t kBlocks = 32, kBlockRows = 512;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kProductsPerThread = 2097152;

// Calls function(bytes) with the width of the widest registers, a constant, compiled for instructions that have them.
// Clones of one function would not do: vectors of 64 bytes take 15 times as long with AVX2 as vectors of 32.
template <class Function>
void at_any_width(const Function& function) {
  function(std::integral_constant<int, 16>());
}

#if defined(RFTCORE_TARGET_CLONES)
template <class Function>
__attribute__((target("avx2,fma"))) void at_32_bytes(const Function& function) {
  function(std::integral_constant<int, 32>());
}

template <class Function>
__attribute__((target("avx512f"))) void at_64_bytes(const Function& function) {
  function(std::integral_constant<int, 64>());
}

template <class Function>
void at_best_width(const Function& function) {
  static const int bytes = __builtin_cpu_supports("avx512f")                                  ? 64
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32
                                                                                             : 16;
  if (bytes == 64) return at_64_bytes(function);
  if (bytes == 32) return at_32_bytes(function);
  at_any_width(function);
}
#else
template <class Function>
void at_best_width(const Function& function) {
  at_any_width(function);
}
#endif

#if defined(__GNUC__)
#define RFTCORE_INLINE_LAMBDA __attribute__((always_inline))
template <class T, int Bytes>
struct Lanes {
  typedef T type __attribute__((vector_size(Bytes)));
};
#else
#define RFTCORE_INLINE_LAMBDA
template <class T, int Bytes>
struct Array {
  static constexpr int kCount = Bytes / sizeof(T);
  T lanes[kCount];
  Array& operator+=(const Array& other) {
    for (int i = 0; i < kCount; ++i) lanes[i] += other.lanes[i];
    return *this;
  }
  friend Array operator*(const Array& a, const Array& b) {
    Array product;
    for (int i = 0; i < kCount; ++i) product.lanes[i] = a.lanes[i] * b.lanes[i];
    return product;
  }
  friend Array operator*(T a, const Array& b) {
    Array product;
    for (int i = 0; i < kCount; ++i) product.lanes[i] = a * b.lanes[i];
    return product;
  }
};
template <class T, int Bytes>
struct Lanes {
  using type = Array<T, Bytes>;
};
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RFTCORE_SHUFFLES
#endif
#endif

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

template <class Stored, class T>
RFTCORE_SIMD void read(const Stored* from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(from[i]);
}

template <class Stored, class T>
RFTCORE_SIMD void write(const T* from, int64_t count, Stored* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<Stored>(from[i]);
}

template <class Stored, class T>
RFTCORE_SIMD void add(const Stored* from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += convert<T>(from[i]);
}

template <class Stored, class T>
RFTCORE_SIMD void round_through(int64_t count, T* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = convert<T>(convert<Stored>(values[i]));
}

template <class T>
constexpr int kCode = std::is_same_v<T, double> ? 0 : 1;

// `count` values from `first` on, as numbers of `through`.
template <class T>
void read_values(const Vector& from, int64_t first, int64_t count, int through, T* to) {
  with_dtype(from.dtype, [&](auto stored) {
    read(static_cast<const decltype(stored)*>(from.values) + first, count, to);
  });
  if (narrows(from.dtype, through))
    with_dtype(through, [&](auto stored) { round_through<decltype(stored)>(count, to); });
}

template <class T>
void write_values(const T* from, int64_t first, int64_t count, const Vector& to) {
  with_dtype(to.dtype, [&](auto stored) {
    write(from, count, static_cast<decltype(stored)*>(to.values) + first);
  });
}

// Strips of a matrix in the maths type: where they lie, or in a buffer that remembers what it holds.
template <class T>
class Strips {
 public:
  // To be read as numbers of the adapters' dtypes, or, without adapters, to be changed.
  Strips(const Vector& matrix, int64_t columns, const std::vector<Adapter>& adapters)
      : matrix_(matrix), columns_(columns) {
    bool converts = matrix.dtype != kCode<T>;
    for (const Adapter& adapter : adapters) converts |= narrows(matrix.dtype, adapter.dtype);
    if (matrix && converts) buffer_.resize(kStripRows * columns);
  }

  const T* read(int64_t row, int64_t rows, int through) {
    if (matrix_.dtype == kCode<T> && !narrows(matrix_.dtype, through))
      return static_cast<const T*>(matrix_.values) + row * columns_;
    if (row != row_ || through != through_)
      read_values(matrix_, row * columns_, rows * columns_, through, buffer_.data());
    row_ = row, through_ = through;
    return buffer_.data();
  }

  // Calls function(values, row, rows), which may change them; in a buffer, on few rows, for the first-level cache.
  template <class Function>
  void change(int64_t row, int64_t rows, const Function& function) {
    if (matrix_.dtype == kCode<T>) return function(static_cast<T*>(matrix_.values) + row * columns_, row, rows);
    for (const int64_t end = row + rows; row < end; row += kTileRows) {
      rows = std::min(kTileRows, end - row);
      read_values(matrix_, row * columns_, rows * columns_, matrix_.dtype, buffer_.data());
      function(buffer_.data(), row, rows);
      write_values(buffer_.data(), row * columns_, rows * columns_, matrix_);
    }
  }

 private:
  Vector matrix_;
  int64_t columns_, row_ = -1;
  int through_ = -1;
  std::vector<T> buffer_;
};

// Neighbouring adapters that compute in one dtype, and of one output where `by_output`.
struct Run {
  int64_t first_rank, ranks, output;
  int dtype;
};

std::vector<Run> runs_of(const std::vector<Adapter>& adapters, bool by_output) {
  std::vector<Run> runs;
  int64_t rank = 0;
  for (const Adapter& adapter : adapters) {
    const bool joins = !runs.empty() && runs.back().dtype == adapter.dtype &&
                       (!by_output || runs.back().output == adapter.output);
    if (joins)
      runs.back().ranks += adapter.rank;
    else
      runs.push_back({rank, adapter.rank, adapter.output, adapter.dtype});
    rank += adapter.rank;
  }
  return runs;
}

// Of all outputs, or of one.
int64_t ranks_of(const std::vector<Adapter>& adapters, int64_t output = -1) {
  int64_t ranks = 0;
  for (const Adapter& adapter : adapters) ranks += output < 0 || adapter.output == output ? adapter.rank : 0;
  return ranks;
}

// All a under each other, (ranks, width).
template <class T>
std::vector<T> stack_a(const std::vector<Adapter>& adapters, int64_t width) {
  std::vector<T> stack(ranks_of(adapters) * width);
  T* at = stack.data();
  for (const Adapter& adapter : adapters) {
    read_values(adapter.a, 0, adapter.rank * width, adapter.dtype, at);
    at += adapter.rank * width;
  }
  return stack;
}

// The b of each output, transposed and scaled, under each other: (ranks, columns) for each.
template <class T>
std::vector<std::vector<T>> stack_b(const std::vector<Adapter>& adapters, const std::vector<int64_t>& columns) {
  std::vector<std::vector<T>> stacks(columns.size());
  std::vector<T> values;
  for (const Adapter& adapter : adapters) {
    const int64_t width = columns[adapter.output], rank = adapter.rank;
    values.resize(width * rank);
    read_values(adapter.b, 0, width * rank, adapter.dtype, values.data());
    std::vector<T>& stack = stacks[adapter.output];
    const int64_t first = stack.size();
    stack.resize(first + rank * width);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t c = 0; c < width; ++c) stack[first + j * width + c] = T(adapter.scale) * values[c * rank + j];
  }
  return stacks;
}

// Calls function(begin, end, worker) on ranges that cover [0, count), each by a worker with its own scratch memory.
template <class Worker, class Function>
void share_out(int64_t count, int64_t grain, int64_t threads, const Worker& worker, const Function& function) {
  const int64_t shares = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(1, grain)));
  std::vector<Worker> workers(shares, worker);
  parallel_for(shares, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(count * i / shares, count * (i + 1) / shares, workers[i]);
  });
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void forward_as(const Forward& a, int64_t threads) {
  struct Worker {
    Strips<T> n;
    std::vector<Strips<T>> outputs;
    std::vector<T> h;
  };
  std::vector<int64_t> columns;
  int64_t sum = 0;
  for (const Output& output : a.outputs) columns.push_back(output.columns), sum += output.columns;
  const std::vector<T> stack = stack_a<T>(a.adapters, a.width);
  const std::vector<std::vector<T>> stacks = stack_b<T>(a.adapters, columns);
  const std::vector<Run> runs = runs_of(a.adapters, false);
  const int64_t ranks = ranks_of(a.adapters);

  Worker worker{Strips<T>(a.n, a.width, a.adapters), {}, std::vector<T>(kStripRows * ranks)};
  for (const Output& output : a.outputs) worker.outputs.emplace_back(output.y, output.columns, std::vector<Adapter>());
  const int64_t products = kStripRows * (ranks * a.width + sum * std::max<int64_t>(1, ranks));
  share_out(divide_up(a.rows, kStripRows), kProductsPerThread / std::max<int64_t>(1, products), threads, worker,
            [&](int64_t begin, int64_t end, Worker& own) {
    for (int64_t row = begin * kStripRows; row < std::min(a.rows, end * kStripRows); row += kStripRows) {
      const int64_t rows = std::min(kStripRows, a.rows - row);
      for (const Run& run : runs)
        shrink(own.n.read(row, rows, run.dtype), rows, stack.data() + run.first_rank * a.width, run.ranks, a.width,
               own.h.data() + run.first_rank, ranks);
      const T* h = own.h.data();
      for (size_t i = 0; i < a.outputs.size(); ++i) {
        const Output& output = a.outputs[i];
        const int64_t its_ranks = ranks_of(a.adapters, i);
        own.outputs[i].change(row, rows, [&](T* y, int64_t from, int64_t count) {
          if (output.residual)
            with_dtype(output.residual.dtype, [&](auto stored) {
              add(static_cast<const decltype(stored)*>(output.residual.values) + from * output.columns,
                  count * output.columns, y);
            });
          expand(h + (from - row) * ranks, ranks, count, stacks[i].data(), its_ranks, output.columns, y);
        });
        h += its_ranks;
      }
    }
  });
}

// Adds the blocks' sums of one row of a gradient.
template <class T>
RFTCORE_SIMD void add_blocks(const T* sums, int64_t blocks, int64_t stride, int64_t count, double scale,
                             double* __restrict total) {
  for (int64_t i = 0; i < count; ++i) total[i] = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < count; ++i) total[i] += sums[block * stride + i];
  for (int64_t i = 0; i < count; ++i) total[i] *= scale;
}

template <class T>
void backward_as(const Backward& a, int64_t threads) {
  struct Worker {
    Strips<T> n, grad_n;
    std::vector<Strips<T>> grads;
    std::vector<T> h, below;
  };
  std::vector<int64_t> columns;
  for (const GradOutput& grad : a.grads) columns.push_back(grad.columns);
  bool needs_a = false, needs_b = false;
  for (const Adapter& adapter : a.adapters) needs_a |= bool(adapter.grad_a), needs_b |= bool(adapter.grad_b);
  const std::vector<T> stack = stack_a<T>(a.adapters, a.width);
  const std::vector<std::vector<T>> stacks = stack_b<T>(a.adapters, columns);
  const std::vector<Run> runs = runs_of(a.adapters, false), runs_by_output = runs_of(a.adapters, true);
  const int64_t ranks = ranks_of(a.adapters);

  // Where the sums of a block lie: those of all a, then those of the b of each run.
  const int64_t sums_of_a = needs_a ? ranks * a.width : 0;
  int64_t sums_of_b = 0;
  for (const Run& run : runs_by_output) sums_of_b += run.ranks * columns[run.output];
  const int64_t stride = sums_of_a + (needs_b ? sums_of_b : 0);
  const int64_t block_rows =
      std::max(kBlockRows, divide_up(divide_up(a.rows, kBlocks), kStripRows) * kStripRows);
  const int64_t blocks = divide_up(a.rows, block_rows);
  std::vector<T> sums(blocks * stride);

  Worker worker{Strips<T>(a.n, a.width, a.adapters), Strips<T>(a.grad_n, a.width, {}), {},
                std::vector<T>(kStripRows * ranks), std::vector<T>(kStripRows * ranks)};
  for (const GradOutput& grad : a.grads) worker.grads.emplace_back(grad.values, grad.columns, a.adapters);
  const int64_t products = block_rows * 2 * (ranks * a.width + sums_of_b);
  share_out(blocks, kProductsPerThread / std::max<int64_t>(1, products), threads, worker,
            [&](int64_t begin, int64_t end, Worker& own) {
    T *h = own.h.data(), *below = own.below.data();
    for (int64_t row = begin * block_rows; row < std::min(a.rows, end * block_rows); row += kStripRows) {
      const int64_t rows = std::min(kStripRows, a.rows - row);
      T* const block = sums.data() + row / block_rows * stride;
      if (needs_b)
        for (const Run& run : runs)
          shrink(own.n.read(row, rows, run.dtype), rows, stack.data() + run.first_rank * a.width, run.ranks, a.width,
                 h + run.first_rank, ranks);
      T* at = block + sums_of_a;
      int64_t first_of_output = 0, output = -1;
      for (const Run& run : runs_by_output) {
        if (run.output != output) output = run.output, first_of_output = run.first_rank;
        const int64_t width = columns[run.output];
        const T* grad = own.grads[run.output].read(row, rows, run.dtype);
        shrink(grad, rows, stacks[run.output].data() + (run.first_rank - first_of_output) * width, run.ranks, width,
               below + run.first_rank, ranks);
        if (needs_b) add_outer(h + run.first_rank, ranks, rows, grad, run.ranks, width, at);
        at += run.ranks * width;
      }
      if (needs_a)
        for (const Run& run : runs)
          add_outer(below + run.first_rank, ranks, rows, own.n.read(row, rows, run.dtype), run.ranks, a.width,
                    block + run.first_rank * a.width);
      if (a.grad_n)
        own.grad_n.change(row, rows, [&](T* grad_n, int64_t from, int64_t count) {
          expand(below + (from - row) * ranks, ranks, count, stack.data(), ranks, a.width, grad_n);
        });
    }
  });

  std::vector<double> total;
  const T *of_a = sums.data(), *of_b = sums.data() + sums_of_a;
  for (const Adapter& adapter : a.adapters) {
    const int64_t width = columns[adapter.output];
    total.resize(std::max(a.width, width) * adapter.rank);
    if (adapter.grad_a) {
      add_blocks(of_a, blocks, stride, adapter.rank * a.width, 1.0, total.data());
      write_values(total.data(), 0, adapter.rank * a.width, adapter.grad_a);
    }
    if (adapter.grad_b) {
      add_blocks(of_b, blocks, stride, adapter.rank * width, adapter.scale, total.data());
      with_dtype(adapter.grad_b.dtype, [&](auto stored) {
        auto* values = static_cast<decltype(stored)*>(adapter.grad_b.values);
        for (int64_t j = 0; j < adapter.rank; ++j)
          for (int64_t c = 0; c < width; ++c)
            values[c * adapter.rank + j] = convert<decltype(stored)>(total[j * width + c]);
      });
    }
    of_a += adapter.rank * a.width;
    of_b += adapter.rank * width;
  }
}

template <class Matrices>
bool is_wide(const Problem& p, const Matrices& matrices) {
  const auto wide = [](const Vector& values) { return values && values.dtype == 0; };
  bool found = wide(p.n);
  for (const Adapter& adapter : p.adapters) found |= wide(adapter.a) || wide(adapter.b);
  for (const Vector& matrix : matrices) found |= wide(matrix);
  return found;
}

}  // namespace

void lora_add(const Forward& arguments, int64_t threads) {
  std::vector<Vector> matrices;
  for (const Output& output : arguments.outputs) matrices.insert(matrices.end(), {output.y, output.residual});
  is_wide(arguments, matrices) ? forward_as<double>(arguments, threads) : forward_as<float>(arguments, threads);
}

void lora_grads(const Backward& arguments, int64_t threads) {
  std::vector<Vector> matrices{arguments.grad_n};
  for (const GradOutput& grad : arguments.grads) matrices.push_back(grad.values);
  is_wide(arguments, matrices) ? backward_as<double>(arguments, threads) : backward_as<float>(arguments, threads);
}

}  // namespace rftcore::cpu
