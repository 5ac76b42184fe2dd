// group_norm_silu on a GPU. Statistics, and the sums of the backward, are those of a whole group of a sample, and each
// is spread over many blocks. Either a first launch writes what every block finds of its groups, and every block of a
// second one merges the few parts its groups have; or, where a tile of channels fits the shared memory of a cluster of
// blocks, one launch does both and reads its inputs once. Nothing is added atomically: the order is always the same.
#include "group_norm_silu.h"

#include <algorithm>
#include <type_traits>

#include "group_norm_silu_channels.h"
#include "group_norm_silu_columns.h"
#include "group_norm_silu_cut.h"
#include "group_norm_silu_resident.h"
#include "group_norm_silu_rows.h"
#include "launch.h"

namespace rftcore::cuda {

namespace {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Values in 16 bytes.
template <class Stored>
constexpr int kVectorOf = 16 / int(sizeof(Stored));

// Calls function(vector): with 16 bytes at a time where addresses and shape allow that.
template <class Stored, class Function>
void with_vector(const Problem& p, bool is_aligned, const Function& function) {
  is_aligned && fits_vectors(p, kVectorOf<Stored>) ? function(Constant<kVectorOf<Stored>>{}) : function(Constant<1>{});
}

template <class Function>
void with_flag(bool flag, const Function& function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

// One position: both memory formats are the same, and a channel has nothing to share among lanes.
template <class Arguments>
Arguments normalised(const Arguments& arguments) {
  Arguments a = arguments;
  a.channels_last = a.channels_last || a.positions <= 1;
  return a;
}

template <class Stored>
Cut cut_of(const Problem& p, int vector) {
  return p.channels_last ? cut_columns(p, vector, sizeof(Stored)) : cut_rows(p, vector);
}

int64_t blocks_of(const Problem& p, const Cut& cut) {
  return p.channels_last ? p.batch * cut.tiles * cut.chunks : ceil_div(p.batch * p.channels * cut.chunks, cut.rows);
}

// Bytes of shared memory for `planes` entries per thread and channel, and `per_channel` and `per_group` values of each.
template <class T>
int64_t shared_bytes(const Cut& cut, int64_t planes, int64_t per_channel, int64_t per_group) {
  return ((planes * cut.rows + per_channel) * cut.tile_channels + per_group * cut.tile_groups) * int64_t(sizeof(T));
}

template <class Stored, int kVector, bool silu>
void forward_as(const Forward& a, uintptr_t stream) {
  using T = maths_of<Stored>;
  const char* const name = "group_norm_silu_forward";
  if constexpr (kVector > 1) {
    const auto kernel = resident_forward_kernel<Stored, kVector, silu>;
    if (const Resident resident = cut_resident(a, kVector, sizeof(Stored), 1, architecture_of(name, kernel))) {
      const Cut& cut = resident.cut;
      const Grid grid = {blocks_of(a, cut), cut.threads(), resident.data_bytes + shared_bytes<T>(cut, 2, 4, 5),
                         cut.chunks};
      if (grid.shared_bytes <= shared_limit(name)) return launch(name, kernel, grid, stream, a, cut, resident.slots);
    }
  }
  const Cut cut = cut_of<Stored>(a, kVector);
  const int64_t blocks = blocks_of(a, cut);
  if (a.channels_last) {
    launch(name, column_moments_kernel<Stored, kVector>, {blocks, cut.threads(), shared_bytes<T>(cut, 2, 1, 0)}, stream,
           a, cut);
    launch(name, column_output_kernel<Stored, kVector, silu>, {blocks, cut.threads(), shared_bytes<T>(cut, 0, 3, 2)},
           stream, a, cut);
  } else {
    launch(name, row_moments_kernel<Stored, kVector>, {blocks, kThreads}, stream, a, cut);
    launch(name, row_output_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
  }
}

template <class Stored, int kVector, bool silu>
void backward_as(const Backward& a, uintptr_t stream) {
  using T = maths_of<Stored>;
  const char* const name = "group_norm_silu_backward";
  if constexpr (kVector > 1) {
    const auto kernel = resident_backward_kernel<Stored, kVector, silu>;
    if (!a.per_channel())
      if (const Resident resident = cut_resident(a, kVector, sizeof(Stored), 2, architecture_of(name, kernel))) {
        const Cut& cut = resident.cut;
        const Grid grid = {blocks_of(a, cut), cut.threads(), resident.data_bytes + shared_bytes<T>(cut, 2, 5, 6),
                           cut.chunks};
        if (grid.shared_bytes <= shared_limit(name)) return launch(name, kernel, grid, stream, a, cut, resident.slots);
      }
  }
  const Cut cut = cut_of<Stored>(a, kVector);
  const int64_t blocks = blocks_of(a, cut);
  if (blocks > 0) {
    if (a.channels_last) {
      with_flag(a.per_channel(), [&](auto per_channel) {
        launch(name, column_sums_kernel<Stored, kVector, silu, per_channel()>,
               {blocks, cut.threads(), shared_bytes<T>(cut, per_channel() ? 3 : 2, 3, 2)}, stream, a, cut);
      });
      launch(name, column_gradient_kernel<Stored, kVector, silu>,
             {blocks, cut.threads(), shared_bytes<T>(cut, 0, 5, 4)}, stream, a, cut);
    } else {
      launch(name, row_sums_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
      launch(name, row_gradient_kernel<Stored, kVector, silu>, {blocks, kThreads}, stream, a, cut);
    }
  }
  if (!a.per_channel()) return;
  launch(name, channel_gradients_kernel<T>,
         {ceil_div(a.channels, kWarp) * (a.batch + 1), kThreads, int64_t(kThreads * sizeof(double))}, stream, a, cut);
}

}  // namespace

void group_norm_silu_forward(const Forward& arguments, uintptr_t stream) {
  if (arguments.batch == 0) return;
  const Forward a = normalised(arguments);
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    with_vector<Stored>(a, aligned(a.x, a.y), [&](auto vector) {
      with_flag(a.silu, [&](auto silu) { forward_as<Stored, vector(), silu()>(a, stream); });
    });
  });
}

void group_norm_silu_backward(const Backward& arguments, uintptr_t stream) {
  // Gradients of weight and bias are written, 0, where there is no sample.
  if (arguments.batch == 0 && !arguments.per_channel()) return;
  const Backward a = normalised(arguments);
  with_dtype(a.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    with_vector<Stored>(a, aligned(a.x, a.grad_y, a.grad_x), [&](auto vector) {
      with_flag(a.silu, [&](auto silu) { backward_as<Stored, vector(), silu()>(a, stream); });
    });
  });
}

int64_t group_norm_silu_workspace(const Problem& problem, Pass pass) {
  const Problem p = normalised(problem);
  int64_t elements = 0;
  with_dtype(p.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    // Addresses that are not aligned are not known yet.
    for (int vector : {1, kVectorOf<Stored>}) {
      if (vector > 1 && !fits_vectors(p, vector)) continue;
      const Cut cut = cut_of<Stored>(p, vector);
      const BackwardWorkspace backward(p, cut, pass == Pass::backward_per_channel);
      elements = std::max(elements, pass == Pass::forward ? backward.gradients : backward.end);
    }
  });
  return elements;
}

}  // namespace rftcore::cuda
