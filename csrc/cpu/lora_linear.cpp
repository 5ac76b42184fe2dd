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
#include "skinny.h"

namespace rftcore::cpu {

using namespace lora_linear;
using skinny::add_outer, skinny::expand, skinny::kTileRows, skinny::shrink;

namespace {

constexpr int64_t kStripRows = 32;
// Blocks of the sums of gradients: at most so many, of at least so many rows.
constexpr int64_t kBlocks = 32, kBlockRows = 512;
// About 100 us of work, against 20 us to start a thread.
constexpr int64_t kProductsPerThread = 2097152;

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
