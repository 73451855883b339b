// SPDX-License-Identifier: Apache-2.0
// Small matrix products on operands that lie in L1 or L2, for chunk kernels: row-major, no packing,
// no threads. T is float or double. Widths (columns of B and C) are multiples of the vector length;
// callers pad their buffers. Include inside the foreach_target pattern, after hwy/highway.h.
#if defined(GDN_KERNELS_SIMD_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_GEMM_INL_H_
#undef GDN_KERNELS_SIMD_GEMM_INL_H_
#else
#define GDN_KERNELS_SIMD_GEMM_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <typename T>
using Tag = hn::ScalableTag<T>;

// A register tile is kTileRows x 2 vectors: with 32 registers 16 sums hide the FMA latency on two
// ports and a loaded row of B is used 8 times; with 16 registers half of that. Half is just as many
// sums as hide the latency, with nothing to spare, so products there take kTallRows while these fit
// the rows that are left.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr size_t kTileRows = 8, kTallRows = 8;
#else
inline constexpr size_t kTileRows = 4, kTallRows = 6;
#endif

template <typename T>
HWY_INLINE size_t lanes() {
  return hn::Lanes(Tag<T>());
}
// Columns of a register tile.
template <typename T>
HWY_INLINE size_t panel_width() {
  return 2 * lanes<T>();
}

// What the sums of a product start from. `tile(i, j)` is the same for the tile at row i, column j;
// `start` fills a tile's sums.
template <typename T>
struct FromZero {
  HWY_INLINE FromZero tile(size_t, size_t) const { return {}; }
  template <size_t kRows, size_t kVectors>
  HWY_INLINE void start(hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) const {
    for (size_t i = 0; i < kRows; ++i) {
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(Tag<T>());
    }
  }
};
template <typename T>
struct FromMatrix {
  const T* c;
  size_t ld;
  HWY_INLINE FromMatrix tile(size_t i, size_t j) const { return {c + i * ld + j, ld}; }
  template <size_t kRows, size_t kVectors>
  HWY_INLINE void start(hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) const {
    const Tag<T> d;
    for (size_t i = 0; i < kRows; ++i) {
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = hn::LoadU(d, c + i * ld + j * hn::Lanes(d));
    }
  }
};
// Rows of a matrix times factors s[0], s[step], ...
template <typename T>
struct FromScaledRows {
  const T* c;
  size_t ld;
  const T* s;
  size_t step;
  HWY_INLINE FromScaledRows tile(size_t i, size_t j) const {
    return {c + i * ld + j, ld, s + i * step, step};
  }
  template <size_t kRows, size_t kVectors>
  HWY_INLINE void start(hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) const {
    const Tag<T> d;
    for (size_t i = 0; i < kRows; ++i) {
      const auto f = hn::Set(d, s[i * step]);
      for (size_t j = 0; j < kVectors; ++j) {
        sum[i][j] = hn::Mul(f, hn::LoadU(d, c + i * ld + j * hn::Lanes(d)));
      }
    }
  }
};

// The depth of a product: `blocks` times k, between which A and B move on by a_step and b_step.
struct Depth {
  size_t k, blocks = 1, a_step = 0, b_step = 0;
};

template <size_t kRows, size_t kVectors, bool kTransA, typename T>
HWY_INLINE void multiply_add(size_t k, const T* HWY_RESTRICT a, size_t lda, const T* HWY_RESTRICT b,
                             size_t ldb, hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  using V = hn::Vec<Tag<T>>;
  for (size_t l = 0; l < k; ++l) {
    V row[kVectors];
    for (size_t j = 0; j < kVectors; ++j) row[j] = hn::LoadU(d, b + l * ldb + j * n);
    for (size_t i = 0; i < kRows; ++i) {
      const V x = hn::Set(d, kTransA ? a[l * lda + i] : a[i * lda + l]);
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(x, row[j], sum[i][j]);
    }
  }
}

// Z B for lower triangular Z (kTrans: Z^T B), of which only the columns that are not zero are read.
// `row`: where the tile begins.
template <typename T, bool kTrans>
struct FromTriangle {
  const T* z;
  size_t ldz;
  const T* b;
  size_t ldb;
  size_t rows;
  size_t row = 0;
  HWY_INLINE FromTriangle tile(size_t i, size_t j) const {
    return {z, ldz, b + j, ldb, rows, row + i};
  }
  template <size_t kRows, size_t kVectors>
  HWY_INLINE void start(hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) const {
    FromZero<T>().start(sum);
    if (kTrans) {
      multiply_add<kRows, kVectors, true>(rows - row, z + row * ldz + row, ldz, b + row * ldb, ldb,
                                          sum);
    } else {
      multiply_add<kRows, kVectors, false>(row + kRows, z + row * ldz, ldz, b, ldb, sum);
    }
  }
};

struct NoWork {
  HWY_INLINE void operator()() const {}
};

template <size_t kRows, size_t kVectors, bool kTransA, typename T, class From,
          typename Between = NoWork>
HWY_INLINE void gemm_tile(From from, Depth depth, const T* HWY_RESTRICT a, size_t lda,
                          const T* HWY_RESTRICT b, size_t ldb, T* c, size_t ldc,
                          Between between = Between()) {
  const Tag<T> d;
  hn::Vec<Tag<T>> sum[kRows][kVectors];
  from.start(sum);
  for (size_t block = 0; block < depth.blocks; ++block) {
    multiply_add<kRows, kVectors, kTransA>(depth.k, a + block * depth.a_step, lda,
                                           b + block * depth.b_step, ldb, sum);
    between();
  }
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t j = 0; j < kVectors; ++j) {
      hn::StoreU(sum[i][j], d, c + i * ldc + j * hn::Lanes(d));
    }
  }
}

// C[m,n] = from + op(A) B, where op(A) is A[m,k] or the transpose of A[k,m]. `between` is called
// after each block of the depth of each tile: the place for a few prefetches.
template <bool kTransA, typename T, class From, typename Between = NoWork>
HWY_INLINE void gemm(From from, size_t m, size_t n, Depth depth, const T* a, size_t lda, const T* b,
                     size_t ldb, T* c, size_t ldc, Between between = Between()) {
  const size_t step = lanes<T>();
  const size_t a_row = kTransA ? 1 : lda;
  size_t j = 0;
  for (; j + 2 * step <= n; j += 2 * step) {
    size_t i = 0;
    if constexpr (kTallRows > kTileRows) {
      for (; m - i >= kTallRows && m - i != 2 * kTileRows; i += kTallRows) {
        gemm_tile<kTallRows, 2, kTransA>(from.tile(i, j), depth, a + i * a_row, lda, b + j, ldb,
                                         c + i * ldc + j, ldc, between);
      }
    }
    for (; i + kTileRows <= m; i += kTileRows) {
      gemm_tile<kTileRows, 2, kTransA>(from.tile(i, j), depth, a + i * a_row, lda, b + j, ldb,
                                       c + i * ldc + j, ldc, between);
    }
    for (; i < m; ++i) {
      gemm_tile<1, 2, kTransA>(from.tile(i, j), depth, a + i * a_row, lda, b + j, ldb,
                               c + i * ldc + j, ldc);
    }
  }
  if (j < n) {
    size_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      gemm_tile<kTileRows, 1, kTransA>(from.tile(i, j), depth, a + i * a_row, lda, b + j, ldb,
                                       c + i * ldc + j, ldc, between);
    }
    for (; i < m; ++i) {
      gemm_tile<1, 1, kTransA>(from.tile(i, j), depth, a + i * a_row, lda, b + j, ldb,
                               c + i * ldc + j, ldc);
    }
  }
}

enum class Into { kSet, kAdd };  // C = op(A) B, C += op(A) B

template <Into kInto, bool kTransA, typename T, typename Between = NoWork>
HWY_INLINE void gemm(size_t m, size_t n, size_t k, const T* a, size_t lda, const T* b, size_t ldb,
                     T* c, size_t ldc, Between between = Between()) {
  if constexpr (kInto == Into::kSet) {
    gemm<kTransA>(FromZero<T>(), m, n, {k}, a, lda, b, ldb, c, ldc, between);
  } else {
    gemm<kTransA>(FromMatrix<T>{c, ldc}, m, n, {k}, a, lda, b, ldb, c, ldc, between);
  }
}

// Factors s of a triangular solve: one per row, or one per element.
template <typename T>
struct RowFactors {
  const T* s;
  HWY_INLINE hn::Vec<Tag<T>> at(size_t i, size_t) const { return hn::Set(Tag<T>(), s[i]); }
  HWY_INLINE RowFactors from(size_t i, size_t) const { return {s + i}; }
};
template <typename T>
struct ElementFactors {
  const T* s;
  size_t ld;
  HWY_INLINE hn::Vec<Tag<T>> at(size_t i, size_t j) const {
    return hn::LoadU(Tag<T>(), s + i * ld + j);
  }
  HWY_INLINE ElementFactors from(size_t i, size_t j) const { return {s + i * ld + j, ld}; }
};

// Rows [i, i + kTileRows) of X in a triangular solve: first what they get from the rows before
// (kUpper: after) them, which are done, then from each other.
template <size_t kVectors, bool kUpper, typename T, class Factors>
HWY_INLINE void solve_tile(size_t m, size_t i, const T* HWY_RESTRICT z, size_t ldz, Factors factors,
                           T* HWY_RESTRICT x, size_t ldx, T* HWY_RESTRICT raw) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  using V = hn::Vec<Tag<T>>;
  V row[kTileRows][kVectors];
  FromMatrix<T>{x + i * ldx, ldx}.start(row);
  if (kUpper) {
    const size_t done = i + kTileRows;
    multiply_add<kTileRows, kVectors, true>(m - done, z + done * ldz + i, ldz, x + done * ldx, ldx,
                                            row);
  } else {
    multiply_add<kTileRows, kVectors, false>(i, z + i * ldz, ldz, x, ldx, row);
  }
  const T* HWY_RESTRICT diagonal = z + i * ldz + i;
  HWY_UNROLL(8)  // or GCC keeps the rows in memory, to index them
  for (size_t step = 0; step < kTileRows; ++step) {
    const size_t s = kUpper ? kTileRows - 1 - step : step;
    for (size_t j = 0; j < kVectors; ++j) {
      if (raw != nullptr) hn::StoreU(row[s][j], d, raw + (i + s) * ldx + j * n);
      row[s][j] = hn::Mul(row[s][j], factors.at(i + s, j * n));
      hn::StoreU(row[s][j], d, x + (i + s) * ldx + j * n);
    }
    HWY_UNROLL(8)
    for (size_t r = 0; r < kTileRows; ++r) {
      if (kUpper ? r >= s : r <= s) continue;
      const V f = hn::Set(d, kUpper ? diagonal[s * ldz + r] : diagonal[r * ldz + s]);
      for (size_t j = 0; j < kVectors; ++j) row[r][j] = hn::MulAdd(f, row[s][j], row[r][j]);
    }
  }
}

// X[m,n] <- Y with R = X + Z Y, Y = s * R, for strictly lower triangular Z[m,m] and factors s; n is
// at most panel_width, m a multiple of kTileRows. R goes to `raw`, laid out as X, unless it is
// null.
template <typename T, class Factors>
HWY_INLINE void solve_lower(size_t m, size_t n, const T* z, size_t ldz, Factors factors, T* x,
                            size_t ldx, T* raw) {
  for (size_t i = 0; i < m; i += kTileRows) {
    n > lanes<T>() ? solve_tile<2, false>(m, i, z, ldz, factors, x, ldx, raw)
                   : solve_tile<1, false>(m, i, z, ldz, factors, x, ldx, raw);
  }
}
// The same with R = X + Z^T Y.
template <typename T, class Factors>
HWY_INLINE void solve_lower_transposed(size_t m, size_t n, const T* z, size_t ldz, Factors factors,
                                       T* x, size_t ldx, T* raw) {
  for (size_t i = m; i > 0; i -= kTileRows) {
    n > lanes<T>() ? solve_tile<2, true>(m, i - kTileRows, z, ldz, factors, x, ldx, raw)
                   : solve_tile<1, true>(m, i - kTileRows, z, ldz, factors, x, ldx, raw);
  }
}

// C += Z B for lower triangular Z[m,m] (entries above the diagonal are zero, and mostly not read).
template <typename T>
HWY_INLINE void gemm_lower(size_t m, size_t n, const T* z, size_t ldz, const T* b, size_t ldb, T* c,
                           size_t ldc) {
  for (size_t i = 0; i < m; i += kTileRows) {
    gemm<Into::kAdd, false>(kTileRows, n, i + kTileRows, z + i * ldz, ldz, b, ldb, c + i * ldc,
                            ldc);
  }
}
// C += Z^T B, same Z.
template <typename T>
HWY_INLINE void gemm_lower_transposed(size_t m, size_t n, const T* z, size_t ldz, const T* b,
                                      size_t ldb, T* c, size_t ldc) {
  for (size_t i = 0; i < m; i += kTileRows) {
    gemm<Into::kAdd, true>(kTileRows, n, m - i, z + i * ldz + i, ldz, b + i * ldb, ldb, c + i * ldc,
                           ldc);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
