// SPDX-License-Identifier: Apache-2.0
// What the elementwise recurrences share, whose lanes are channels: blocks of tokens by channels
// copied close together, and an exponential for their decays. Included once per SIMD target, hence
// the toggling guard.
#if defined(GDN_KERNELS_SIMD_SCAN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_SCAN_INL_H_
#undef GDN_KERNELS_SIMD_SCAN_INL_H_
#else
#define GDN_KERNELS_SIMD_SCAN_INL_H_
#endif

#include <cstdint>

#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Channels of a block. A recurrence reads a token's channels a page away from the last token's, too
// far for the processor to guess; copying a block first takes those misses together.
inline constexpr int64_t kScanTile = 64;

// rows x width elements, rows `stride` apart, to rows of kScanTile.
template <typename T>
HWY_INLINE void load_block(const T* from, int64_t stride, int64_t rows, int64_t width,
                           Acc<T>* block) {
  for (int64_t r = 0; r < rows; ++r) {
    for_lanes<Acc<T>>(width, [&](auto d, int64_t i) HWY_ATTR {
      hn::StoreU(load_as(d, from + r * stride + i), d, block + r * kScanTile + i);
    });
  }
}

template <typename T>
HWY_INLINE void store_block(const Acc<T>* block, int64_t stride, int64_t rows, int64_t width,
                            T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for_lanes<Acc<T>>(width, [&](auto d, int64_t i) HWY_ATTR {
      store_as(d, hn::LoadU(d, block + r * kScanTile + i), to + r * stride + i);
    });
  }
}

// exp(x) for x <= 0; a NaN stays one. In fp32 within 2^-23 of the result, by half the instructions
// of the general function: below -86 it returns exp(-86), about 4e-38.
template <class D, class V>
HWY_INLINE V exp_nonpositive(D d, V x) {
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    const hn::RebindToSigned<D> di;
    const auto low = hn::Set(d, -86.0f), shift = hn::Set(d, 12582912.0f);  // 1.5 * 2^23
    x = hn::IfThenElse(hn::Lt(x, low), low, x);
    // n = x / ln 2, rounded, in the low bits of `rounded`; r = x - n ln 2 with ln 2 in two parts
    const auto rounded = hn::MulAdd(x, hn::Set(d, 1.44269504f), shift);
    const auto n = hn::Sub(rounded, shift);
    auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
    r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
    // minimax polynomial of (exp(r) - 1 - r) / r^2 over |r| <= ln 2 / 2
    auto p = hn::MulAdd(r, hn::Set(d, 1.3814467e-3f), hn::Set(d, 8.3687808e-3f));
    p = hn::MulAdd(r, p, hn::Set(d, 4.1668393e-2f));
    p = hn::MulAdd(r, p, hn::Set(d, 1.6666520e-1f));
    p = hn::MulAdd(r, p, hn::Set(d, 4.9999994e-1f));
    p = hn::MulAdd(hn::Mul(r, r), p, hn::Add(r, hn::Set(d, 1.0f)));
    const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, rounded));
    return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  } else {
    return exp_of(d, x);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#endif  // toggling include guard
