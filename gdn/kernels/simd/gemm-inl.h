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
// ports and a loaded row of B is used 8 times; with 16 registers half of that.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr size_t kTileRows = 8;
#else
inline constexpr size_t kTileRows = 4;
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

enum class Into { kSet, kAdd };  // C = A B, C += A B

template <size_t kRows, size_t kVectors, Into kInto, bool kTransA, typename T>
HWY_INLINE void gemm_tile(size_t k, const T* HWY_RESTRICT a, size_t lda, const T* HWY_RESTRICT b,
                          size_t ldb, T* HWY_RESTRICT c, size_t ldc) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  using V = hn::Vec<Tag<T>>;
  V sum[kRows][kVectors];
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t j = 0; j < kVectors; ++j) {
      sum[i][j] = kInto == Into::kAdd ? hn::LoadU(d, c + i * ldc + j * n) : hn::Zero(d);
    }
  }
  for (size_t l = 0; l < k; ++l) {
    V row[kVectors];
    for (size_t j = 0; j < kVectors; ++j) row[j] = hn::LoadU(d, b + l * ldb + j * n);
    for (size_t i = 0; i < kRows; ++i) {
      const V x = hn::Set(d, kTransA ? a[l * lda + i] : a[i * lda + l]);
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(x, row[j], sum[i][j]);
    }
  }
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t j = 0; j < kVectors; ++j) hn::StoreU(sum[i][j], d, c + i * ldc + j * n);
  }
}

struct NoWork {
  HWY_INLINE void operator()() const {}
};

// C[m,n] = or += op(A) B, where op(A) is A[m,k] or the transpose of A[k,m]. `between` is called
// after each register tile: the place for a few prefetches.
template <Into kInto, bool kTransA, typename T, typename Between = NoWork>
HWY_INLINE void gemm(size_t m, size_t n, size_t k, const T* a, size_t lda, const T* b, size_t ldb,
                     T* c, size_t ldc, Between between = Between()) {
  const size_t step = lanes<T>();
  const size_t a_row = kTransA ? 1 : lda;
  size_t j = 0;
  for (; j + 2 * step <= n; j += 2 * step) {
    size_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      gemm_tile<kTileRows, 2, kInto, kTransA>(k, a + i * a_row, lda, b + j, ldb, c + i * ldc + j,
                                              ldc);
      between();
    }
    for (; i < m; ++i) {
      gemm_tile<1, 2, kInto, kTransA>(k, a + i * a_row, lda, b + j, ldb, c + i * ldc + j, ldc);
    }
  }
  if (j < n) {
    size_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      gemm_tile<kTileRows, 1, kInto, kTransA>(k, a + i * a_row, lda, b + j, ldb, c + i * ldc + j,
                                              ldc);
      between();
    }
    for (; i < m; ++i) {
      gemm_tile<1, 1, kInto, kTransA>(k, a + i * a_row, lda, b + j, ldb, c + i * ldc + j, ldc);
    }
  }
}

// Factors s of a triangular solve: one per row, or one per element.
template <typename T>
struct RowFactors {
  const T* s;
  HWY_INLINE hn::Vec<Tag<T>> at(size_t i, size_t) const { return hn::Set(Tag<T>(), s[i]); }
};
template <typename T>
struct ElementFactors {
  const T* s;
  size_t ld;
  HWY_INLINE hn::Vec<Tag<T>> at(size_t i, size_t j) const {
    return hn::LoadU(Tag<T>(), s + i * ld + j);
  }
};

template <size_t kVectors, bool kUpper, typename T, class Factors>
HWY_INLINE void solve_tile(size_t first, const T* HWY_RESTRICT z, size_t ldz, Factors factors,
                           T* HWY_RESTRICT x, size_t ldx, T* HWY_RESTRICT raw) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  using V = hn::Vec<Tag<T>>;
  V row[kTileRows][kVectors];
  for (size_t i = 0; i < kTileRows; ++i) {
    for (size_t j = 0; j < kVectors; ++j) row[i][j] = hn::LoadU(d, x + i * ldx + j * n);
  }
  for (size_t step = 0; step < kTileRows; ++step) {
    const size_t s = kUpper ? kTileRows - 1 - step : step;
    for (size_t j = 0; j < kVectors; ++j) {
      if (raw != nullptr) hn::StoreU(row[s][j], d, raw + s * ldx + j * n);
      row[s][j] = hn::Mul(row[s][j], factors.at(first + s, j * n));
    }
    for (size_t i = 0; i < kTileRows; ++i) {
      if (kUpper ? i >= s : i <= s) continue;
      const V f = hn::Set(d, kUpper ? z[s * ldz + i] : z[i * ldz + s]);
      for (size_t j = 0; j < kVectors; ++j) row[i][j] = hn::MulAdd(f, row[s][j], row[i][j]);
    }
  }
  for (size_t i = 0; i < kTileRows; ++i) {
    for (size_t j = 0; j < kVectors; ++j) hn::StoreU(row[i][j], d, x + i * ldx + j * n);
  }
}

template <size_t kVectors, bool kUpper, typename T, class Factors>
HWY_INLINE void solve_panel(size_t m, const T* z, size_t ldz, Factors factors, T* x, size_t ldx,
                            T* raw) {
  for (size_t step = 0; step < m; step += kTileRows) {
    const size_t i = kUpper ? m - kTileRows - step : step;
    if (kUpper) {
      const size_t done = i + kTileRows;
      gemm_tile<kTileRows, kVectors, Into::kAdd, true>(m - done, z + done * ldz + i, ldz,
                                                       x + done * ldx, ldx, x + i * ldx, ldx);
    } else {
      gemm_tile<kTileRows, kVectors, Into::kAdd, false>(i, z + i * ldz, ldz, x, ldx, x + i * ldx,
                                                        ldx);
    }
    solve_tile<kVectors, kUpper>(i, z + i * ldz + i, ldz, factors, x + i * ldx, ldx,
                                 raw != nullptr ? raw + i * ldx : nullptr);
  }
}

// X[m,n] <- Y with R = X + Z Y, Y = s * R, for strictly lower triangular Z[m,m] and factors s; n is
// at most panel_width, m a multiple of kTileRows. R goes to `raw`, laid out as X, unless it is
// null.
template <typename T, class Factors>
HWY_INLINE void solve_lower(size_t m, size_t n, const T* z, size_t ldz, Factors factors, T* x,
                            size_t ldx, T* raw) {
  n > lanes<T>() ? solve_panel<2, false>(m, z, ldz, factors, x, ldx, raw)
                 : solve_panel<1, false>(m, z, ldz, factors, x, ldx, raw);
}
// The same with R = X + Z^T Y.
template <typename T, class Factors>
HWY_INLINE void solve_lower_transposed(size_t m, size_t n, const T* z, size_t ldz, Factors factors,
                                       T* x, size_t ldx, T* raw) {
  n > lanes<T>() ? solve_panel<2, true>(m, z, ldz, factors, x, ldx, raw)
                 : solve_panel<1, true>(m, z, ldz, factors, x, ldx, raw);
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
