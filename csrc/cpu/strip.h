// A strip of a matrix: what one vector loop works on, whatever the memory format.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rftcore {

constexpr int64_t kLanes = 16;

// `rows` rows of at most kLanes neighbours, `stride` elements apart.
struct Strip {
  int64_t offset, rows, stride, width;
};

// Calls function(strip) on strips that cover `count` neighbouring elements from `offset` on and fit in the first-level
// cache.
template <class Function>
void cut_line(int64_t offset, int64_t count, const Function& function) {
  constexpr int64_t kRows = 256;
  const int64_t rows = count / kLanes;
  for (int64_t row = 0; row < rows; row += kRows)
    function(Strip{offset + row * kLanes, std::min(kRows, rows - row), kLanes, kLanes});
  if (const int64_t rest = count % kLanes) function(Strip{offset + rows * kLanes, 1, kLanes, rest});
}

// Calls function(strip, column) on strips that cover a matrix of `rows` times `columns`, from `offset` on.
template <class Function>
void cut_matrix(int64_t offset, int64_t rows, int64_t columns, const Function& function) {
  for (int64_t column = 0; column < columns; column += kLanes)
    function(Strip{offset + column, rows, columns, std::min(kLanes, columns - column)}, column);
}

}  // namespace rftcore
