// SPDX-License-Identifier: Apache-2.0
// Rows of storage types in and out of fp32/fp64 work buffers, and transposition.
// Include inside the foreach_target pattern, after hwy/highway.h.
#if defined(GDN_KERNELS_SIMD_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_ROWS_INL_H_
#undef GDN_KERNELS_SIMD_ROWS_INL_H_
#else
#define GDN_KERNELS_SIMD_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "gdn/base/dtype.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Conversions of fp16 are instructions from AVX2 on.
#if HWY_TARGET <= HWY_AVX2
inline constexpr bool kHasF16 = true;
#else
inline constexpr bool kHasF16 = false;
#endif

// Inline, for a call of memcpy takes as long as a row of a few vectors.
template <typename A>
HWY_INLINE void copy_row(const A* HWY_RESTRICT src, size_t n, A* HWY_RESTRICT dst) {
  const hn::ScalableTag<A> d;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= n; i += hn::Lanes(d)) hn::StoreU(hn::LoadU(d, src + i), d, dst + i);
  for (; i < n; ++i) dst[i] = src[i];
}

// dst[0, n) = src[offset, offset + n) of type dtype.
template <typename A>
HWY_INLINE void load_row(DType dtype, const void* src, int64_t offset, size_t n,
                         A* HWY_RESTRICT dst) {
  if (dtype == kDTypeOf<A>) {
    copy_row(static_cast<const A*>(src) + offset, n, dst);
  } else if (dtype == DType::kBF16) {
    const BFloat16* p = static_cast<const BFloat16*>(src) + offset;
    for (size_t i = 0; i < n; ++i) dst[i] = to_float(p[i]);
  } else if (dtype == DType::kF16) {
    const Float16* p = static_cast<const Float16*>(src) + offset;
    size_t i = 0;
    if constexpr (kHasF16 && sizeof(A) == 4) {
      const hn::ScalableTag<float> d;
      const hn::Rebind<hwy::float16_t, decltype(d)> d16;
      for (; i + hn::Lanes(d) <= n; i += hn::Lanes(d)) {
        const auto half = hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p) + i);
        hn::StoreU(hn::PromoteTo(d, half), d, dst + i);
      }
    }
    for (; i < n; ++i) dst[i] = to_float(p[i]);
  }
}

// dst[offset, offset + n) of type dtype = src[0, n), rounded to nearest even.
template <typename A>
HWY_INLINE void store_row(DType dtype, void* dst, int64_t offset, size_t n,
                          const A* HWY_RESTRICT src) {
  if (dtype == kDTypeOf<A>) {
    copy_row(src, n, static_cast<A*>(dst) + offset);
  } else if (dtype == DType::kBF16) {
    BFloat16* p = static_cast<BFloat16*>(dst) + offset;
    for (size_t i = 0; i < n; ++i) p[i] = to_bf16(static_cast<float>(src[i]));
  } else if (dtype == DType::kF16) {
    Float16* p = static_cast<Float16*>(dst) + offset;
    size_t i = 0;
    if constexpr (kHasF16 && sizeof(A) == 4) {
      const hn::ScalableTag<float> d;
      const hn::Rebind<hwy::float16_t, decltype(d)> d16;
      for (; i + hn::Lanes(d) <= n; i += hn::Lanes(d)) {
        const auto half = hn::DemoteTo(d16, hn::LoadU(d, src + i));
        hn::StoreU(half, d16, reinterpret_cast<hwy::float16_t*>(p) + i);
      }
    }
    for (; i < n; ++i) p[i] = to_f16(static_cast<float>(src[i]));
  }
}

// dst[cols, rows] = src[rows, cols]^T; both sizes multiples of 4.
template <typename T>
HWY_INLINE void transpose(size_t rows, size_t cols, const T* HWY_RESTRICT src, size_t ld_src,
                          T* HWY_RESTRICT dst, size_t ld_dst) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(T) == 4) {
    const hn::FixedTag<T, 4> d;
    for (size_t i = 0; i < rows; i += 4) {
      for (size_t j = 0; j < cols; j += 4) {
        const T* p = src + i * ld_src + j;
        const auto r0 = hn::LoadU(d, p), r1 = hn::LoadU(d, p + ld_src);
        const auto r2 = hn::LoadU(d, p + 2 * ld_src), r3 = hn::LoadU(d, p + 3 * ld_src);
        const auto a = hn::InterleaveLower(d, r0, r2), b = hn::InterleaveLower(d, r1, r3);
        const auto e = hn::InterleaveUpper(d, r0, r2), f = hn::InterleaveUpper(d, r1, r3);
        T* q = dst + j * ld_dst + i;
        hn::StoreU(hn::InterleaveLower(d, a, b), d, q);
        hn::StoreU(hn::InterleaveUpper(d, a, b), d, q + ld_dst);
        hn::StoreU(hn::InterleaveLower(d, e, f), d, q + 2 * ld_dst);
        hn::StoreU(hn::InterleaveUpper(d, e, f), d, q + 3 * ld_dst);
      }
    }
    return;
  }
#endif
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < cols; ++j) dst[j * ld_dst + i] = src[i * ld_src + j];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
