// SPDX-License-Identifier: Apache-2.0
// Rows of a tensor that may be a slice of a wider one, and the fixed cut of rows into blocks by
// which kernels sum over rows: it depends on the number of rows only, so the sums have the same
// bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gdn {

// `group` rows of `dim` dense elements follow each other; groups begin `stride` elements apart. A
// contiguous tensor has group 1 and stride dim; heads [T, H, D] inside tokens of width W have group
// H and stride W.
struct RowLayout {
  int64_t group = 1;
  int64_t stride = 0;  // 0: dense, group * dim

  int64_t offset(int64_t row, int64_t dim) const {
    const int64_t step = stride == 0 ? group * dim : stride;
    return group == 1 ? row * step : row / group * step + row % group * dim;
  }
};

// At most `max_blocks` blocks of at least `min_rows` rows; one, which is empty, where there are no
// rows: there is always a block whose sums are the sums of all.
struct RowBlocks {
  int64_t rows, size;

  RowBlocks(int64_t rows, int64_t min_rows, int64_t max_blocks = 64)
      : rows(rows), size(std::max({min_rows, (rows + max_blocks - 1) / max_blocks, int64_t{1}})) {}
  int64_t count() const { return std::max<int64_t>(1, (rows + size - 1) / size); }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

// Rows per call of parallel_for's function so that a call is worth a thread's while.
inline int64_t row_grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_row));
}

}  // namespace gdn
