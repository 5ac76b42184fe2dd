// The arguments of o = softmax(q k^T scale) v and of its backward. The specification is attention_reference in
// rftcore/ops/attention.py.
#pragma once

#include <cstdint>

namespace rftcore::attention {

// (batch, heads, tokens, head_dim), with any strides, in elements. Null where it is not wanted.
struct Heads {
  void* values;
  int64_t batch_stride, head_stride, token_stride, column_stride;

  explicit operator bool() const { return values != nullptr; }
};

// All of one dtype; sums in fp32, and in fp64 where that is fp64.
struct Problem {
  int dtype;
  int64_t batch, heads, queries, keys, head_dim;
  double scale;
  Heads q, k, v;
};

// o like q; lse: (batch, heads, queries), contiguous, of the dtype of the sums.
struct Forward : Problem {
  Heads o;
  void* lse;
};

struct Backward : Problem {
  Heads grad_o, o;
  const void* lse;
  Heads grad_q, grad_k, grad_v;
};

}  // namespace rftcore::attention
