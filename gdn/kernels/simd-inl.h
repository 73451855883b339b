// SPDX-License-Identifier: Apache-2.0
// What the elementwise and row-wise kernels share on top of Highway: loads and stores that convert
// the storage types, loops over lanes with a tail, and the activations. Included once per SIMD
// target, hence the toggling guard.
#if defined(GDN_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_INL_H_
#undef GDN_KERNELS_SIMD_INL_H_
#else
#define GDN_KERNELS_SIMD_INL_H_
#endif

#include <cstdint>
#include <type_traits>

#include "gdn/base/dtype.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Calls f(d, i) for i = 0, N, 2N, ... with a full vector tag, then for each index that is left with
// a tag of one lane.
template <typename A, class F>
HWY_INLINE void for_lanes(int64_t n, F&& f) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(d, i);
  const hn::CappedTag<A, 1> d1;
  for (; i < n; ++i) f(d1, i);
}

// Sum over i of f(d, i) with four chains, so that the additions' latency is hidden.
template <typename A, class F>
HWY_INLINE A sum_lanes(int64_t n, F&& f) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, f(d, i));
    s1 = hn::Add(s1, f(d, i + lanes));
    s2 = hn::Add(s2, f(d, i + 2 * lanes));
    s3 = hn::Add(s3, f(d, i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, f(d, i));
  const hn::CappedTag<A, 1> d1;
  auto tail = hn::Zero(d1);
  for (; i < n; ++i) tail = hn::Add(tail, f(d1, i));
  const auto total = hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
  return hn::GetLane(total) + hn::GetLane(tail);
}

template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const double* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const float* p) {
  return hn::LoadU(d, p);
}
// fp32 from the 16 upper bits in each lane.
template <class D, class V16>
HWY_INLINE hn::Vec<D> widen_bf16(D d, V16 bits) {
  const hn::RebindToUnsigned<D> du;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  return widen_bf16(d, hn::LoadU(d16, &p->bits));
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const Float16* p) {
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}

// Rounds to nearest even; a NaN stays one.
template <class D, class V>
HWY_INLINE auto narrow_bf16(D d, V v) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> d16;
  const auto u = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(u, hn::Set(du, 0x400000));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  return hn::DemoteTo(
      d16, hn::BitCast(di, upper));  // saturates at 65535, which the 16 bits never exceed
}

template <class D, class V>
HWY_INLINE void store_as(D d, V v, double* p) {
  hn::StoreU(v, d, p);
}
template <class D, class V>
HWY_INLINE void store_as(D d, V v, float* p) {
  hn::StoreU(v, d, p);
}
template <class D, class V>
HWY_INLINE void store_as(D d, V v, BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  hn::StoreU(narrow_bf16(d, v), d16, &p->bits);
}
#if HWY_TARGET == HWY_AVX3
// bfloat16 that is rounded by an instruction (AVX512_BF16), where the portable way takes eight.
// Numbers below the normal range become 0.
struct HardwareBf16 : BFloat16 {};
template <class D, class V>
HWY_INLINE void store_as(D d, V v, HardwareBf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  hn::Vec<decltype(d16)> half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half.raw) : "v"(v.raw));
  hn::StoreU(half, d16, &p->bits);
}
#endif

// Calls f(T{}) with the type by which kernels read and write elements of `dtype` here.
template <class F>
void dispatch_storage(DType dtype, F&& f) {
#if HWY_TARGET == HWY_AVX3
  if (dtype == DType::kBF16 && __builtin_cpu_supports("avx512bf16")) return f(HardwareBf16{});
#endif
  dispatch_dtype(dtype, f);
}

template <class D, class V>
HWY_INLINE void store_as(D d, V v, Float16* p) {
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM
  const hn::Rebind<hwy::float16_t, D> d16;
  hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(p));
#else  // without an instruction for it, Highway truncates instead of rounding
  HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, d, lanes);
  for (size_t i = 0; i < hn::Lanes(d); ++i) p[i] = to_f16(lanes[i]);
#endif
}

// How a kernel writes an output. Where it touches far more than the caches hold, vectors that are
// whole lines go past them to memory: an ordinary store reads its line first and pushes another one
// out. Smaller vectors do not, since a line that is written in parts may go to memory in parts.
class Output {
 public:
  // `bytes`: all that the kernel reads and writes. Rows begin `row_bytes` apart from `first` on.
  Output(int64_t bytes, const void* first, int64_t row_bytes)
      : past_caches_(bytes >= kFarMoreThanCaches && row_bytes % 64 == 0 &&
                     reinterpret_cast<uintptr_t>(first) % 64 == 0) {}
  template <class D, class V, typename T>
  HWY_INLINE void store(D d, V v, T* p) const {
    if constexpr (std::is_same_v<D, hn::ScalableTag<float>> && std::is_same_v<T, float> &&
                  hn::MaxLanes(D()) == 16) {
      if (past_caches_) return hn::Stream(v, d, p);
    }
    store_as(d, v, p);
  }
  // After the last store of a thread, so that others see all of them.
  void finish() const {
    if (past_caches_) hwy::FlushStream();
  }

 private:
  static constexpr int64_t kFarMoreThanCaches = int64_t{48} << 20;
  bool past_caches_;
};

#if HWY_TARGET == HWY_AVX3
// p 2^n for whole numbers n: one instruction, which overflows to infinity and hands on NaN.
HWY_INLINE hn::Vec512<float> scale_by_power(hn::Vec512<float> p, hn::Vec512<float> n) {
  return hn::Vec512<float>{_mm512_scalef_ps(p.raw, n.raw)};
}
HWY_INLINE hn::Vec256<float> scale_by_power(hn::Vec256<float> p, hn::Vec256<float> n) {
  return hn::Vec256<float>{_mm256_scalef_ps(p.raw, n.raw)};
}
template <size_t N>
HWY_INLINE hn::Vec128<float, N> scale_by_power(hn::Vec128<float, N> p, hn::Vec128<float, N> n) {
  return hn::Vec128<float, N>{_mm_scalef_ps(p.raw, n.raw)};
}
#endif

// exp(x) for x up to 80. Highway's Exp turns a NaN into 0; a kernel must hand it on, or a diverged
// model looks healthy. Far above 80 it returns garbage instead of infinity, so callers keep their
// arguments small.
template <class D, class V>
HWY_INLINE V exp_of(D d, V x) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    // 2^n e^r with |r| <= ln(2)/2, and e^r = 1 + r + r^2 q(r), where q is fitted to a relative
    // error of 3e-9. Min and Max return their second operand where one is NaN.
    x = hn::Min(hn::Set(d, 100.0f), hn::Max(hn::Set(d, -110.0f), x));
    const auto n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504f)));
    auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);  // ln(2) in two parts
    r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
    auto q = hn::MulAdd(r, hn::Set(d, 0.00138138805f), hn::Set(d, 0.00836906303f));
    q = hn::MulAdd(q, r, hn::Set(d, 0.0416684225f));
    q = hn::MulAdd(q, r, hn::Set(d, 0.166665182f));
    q = hn::MulAdd(q, r, hn::Set(d, 0.49999994f));
    q = hn::MulAdd(q, r, hn::Set(d, 1.0f));
    return scale_by_power(hn::MulAdd(q, r, hn::Set(d, 1.0f)), n);
  }
#endif
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

// With fused products the activations are built from parts that share what they can, and with
// AVX-512's estimates they need no division.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#if HWY_TARGET == HWY_AVX3
HWY_INLINE hn::Vec512<float> estimate_reciprocal(hn::Vec512<float> x) {
  return hn::Vec512<float>{_mm512_rcp14_ps(x.raw)};
}
HWY_INLINE hn::Vec256<float> estimate_reciprocal(hn::Vec256<float> x) {
  return hn::Vec256<float>{_mm256_rcp14_ps(x.raw)};
}
template <size_t N>
HWY_INLINE hn::Vec128<float, N> estimate_reciprocal(hn::Vec128<float, N> x) {
  return hn::Vec128<float, N>{_mm_rcp14_ps(x.raw)};
}

// 1/x with one step of Newton's method, and 1 for 1; x must lie within 1e-37 and 8e37.
template <class D, class V>
HWY_INLINE V reciprocal(D d, V x) {
  const auto y = estimate_reciprocal(x);
  return hn::MulAdd(y, hn::NegMulAdd(x, y, hn::Set(d, 1.0f)), y);
}
#else  // AVX2's estimate of 1 is not 1, which 1 - sigmoid would magnify
template <class D, class V>
HWY_INLINE V reciprocal(D d, V x) {
  return hn::Div(hn::Set(d, 1.0f), x);
}
#endif

inline constexpr float kExpLimit = 87.0f;

// exp(x) = fraction * power for |x| <= kExpLimit, to 2e-7 and 2e-8 |x| of itself: power is the
// nearest 2^n, and the fraction, which hands on NaN, a polynomial in [-1/2, 1/2].
template <class V>
struct ExpParts {
  V fraction, power;
};
template <class D, class V>
HWY_INLINE ExpParts<V> exp_parts(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  const auto log2e = hn::Set(d, 1.44269504f);
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lower bits; with 127 more
  // they are the exponent of 2^n.
  const auto shift = hn::Set(d, 12582912.0f + 127.0f);
  const auto shifted = hn::MulAdd(x, log2e, shift);
  const auto f = hn::MulSub(x, log2e, hn::Sub(shifted, shift));
  auto p = hn::MulAdd(f, hn::Set(d, 0.0013276472f), hn::Set(d, 0.009675541f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550713f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.2402212f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.69314694f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  return {p, hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, shifted)))};
}

// log(1 + e) for 0 <= e <= 1, to 1e-7 of itself.
template <class D, class V>
HWY_INLINE V log1p_of_fraction(D d, V e) {
  auto p = hn::MulAdd(e, hn::Set(d, 0.005232694f), hn::Set(d, -0.029505238f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.07822595f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.13663246f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.19106007f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.24842982f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.33319098f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.49999493f));
  return hn::Mul(e, hn::MulAdd(p, e, hn::Set(d, 1.0f)));
}
#endif

// To a few units in the last place; results below the normal range may be 0.
template <class D, class V>
HWY_INLINE V sigmoid(D d, V x) {
  const auto one = hn::Set(d, 1);
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    const auto limit = hn::Set(d, kExpLimit);  // Min and Max return a NaN that comes second
    const auto e = exp_parts(d, hn::Neg(hn::Min(limit, hn::Max(hn::Neg(limit), x))));
    const auto y = reciprocal(d, hn::MulAdd(e.fraction, e.power, one));
    return hn::IfThenZeroElse(hn::Lt(x, hn::Neg(limit)), y);
  }
#endif
  // By exp(-|x|), which cannot overflow and keeps the relative precision of small results.
  const auto e = exp_of(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

template <class V>
struct Softplus {
  V value, slope;
};

// log(1 + exp(x)), which is x itself above 20, and its derivative, the sigmoid.
template <class D, class V>
HWY_INLINE Softplus<V> softplus_and_slope(D d, V x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    const auto one = hn::Set(d, 1), zero = hn::Zero(d);
    const auto parts = exp_parts(d, hn::Max(hn::Set(d, -kExpLimit), hn::Neg(hn::Abs(x))));
    const auto e = hn::IfThenZeroElse(hn::Gt(hn::Abs(x), hn::Set(d, kExpLimit)),
                                      hn::Mul(parts.fraction, parts.power));
    const auto inverse = reciprocal(d, hn::Add(one, e));
    return {hn::Add(hn::Max(zero, x), log1p_of_fraction(d, e)),
            hn::Mul(inverse, hn::IfThenElse(hn::Lt(x, zero), e, one))};
  }
#endif
  const auto limit = hn::Set(d, 20);
  const auto above = hn::Gt(x, limit);
  const auto soft = hn::Log1p(d, exp_of(d, hn::Min(x, limit)));
  return {hn::IfThenElse(hn::Or(above, hn::IsNaN(x)), x, soft),
          hn::IfThenElse(above, hn::Set(d, 1), sigmoid(d, x))};
}

template <class D, class V>
HWY_INLINE V softplus(D d, V x) {
  return softplus_and_slope(d, x).value;
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#endif  // toggling include guard
