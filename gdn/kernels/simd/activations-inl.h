// SPDX-License-Identifier: Apache-2.0
// Exponentials and the activations, of one vector or several side by side. Included once per SIMD
// target, hence the toggling guard.
#if defined(GDN_KERNELS_SIMD_ACTIVATIONS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_ACTIVATIONS_INL_H_
#undef GDN_KERNELS_SIMD_ACTIVATIONS_INL_H_
#else
#define GDN_KERNELS_SIMD_ACTIVATIONS_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/several-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// How near an activation comes to its value: to a few units in the last place of fp32, or to 2^-12
// of itself, an eighth of what rounding to bf16 may add. The latter for results that are rounded
// so, where instructions for bf16 make everything around it so cheap that exponentials and
// divisions are most of a kernel; not for gradients of weights, which stay fp32.
enum class Precision : uint8_t { kFull, kBf16 };
#if HWY_TARGET == HWY_AVX3
template <typename T>
inline constexpr Precision kPrecisionOf =
    std::is_same_v<T, HardwareBf16> ? Precision::kBf16 : Precision::kFull;
#else
template <typename T>
inline constexpr Precision kPrecisionOf = Precision::kFull;
#endif

// With fused products exponentials and what is made of them are built from parts that share what
// they can.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#define GDN_SIMD_FUSED 1
#else
#define GDN_SIMD_FUSED 0
#endif

#if GDN_SIMD_FUSED
// Multiples of ln(2) between which exp keeps to numbers of the normal range and their inverses do:
// at the ends it is 0 and infinity.
inline constexpr float kExpZero = -88.0296919f, kExpInfinite = 88.7228391f;

#if HWY_TARGET == HWY_AVX3
// Entry index % 16 of a table, in each lane.
HWY_INLINE hn::Vec512<float> look_up(const void* table, hn::Vec512<uint32_t> index) {
  return hn::Vec512<float>{_mm512_permutexvar_ps(index.raw, _mm512_load_ps(table))};
}
HWY_INLINE hn::Vec256<float> look_up(const void* table, hn::Vec256<uint32_t> index) {
  const hn::Vec512<uint32_t> wide{_mm512_castsi256_si512(index.raw)};
  return hn::Vec256<float>{_mm512_castps512_ps256(look_up(table, wide).raw)};
}
template <size_t N>
HWY_INLINE hn::Vec128<float, N> look_up(const void* table, hn::Vec128<uint32_t, N> index) {
  const hn::Vec512<uint32_t> wide{_mm512_castsi128_si512(index.raw)};
  return hn::Vec128<float, N>{_mm512_castps512_ps128(look_up(table, wide).raw)};
}
template <class X>
HWY_INLINE auto entries(const void* table, const X& index) {
  return side_by_side([&](const auto& i) HWY_ATTR { return look_up(table, i); }, index);
}

// 2^(j/16), less what an exponent of 4 more bits adds to its bits for them.
alignas(64) inline constexpr uint32_t kPowers[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
inline constexpr float kPowerSteps = 16;

// 2^(k/16) for the whole number k in the lower bits.
template <class D, class V>
HWY_INLINE V power_of(D d, V shifted) {
  const hn::RebindToUnsigned<D> du;
  const auto k = sv::BitCast(du, shifted);
  return sv::BitCast(d, sv::Add(sv::BitCast(du, entries(kPowers, k)), sv::ShiftLeft<19>(k)));
}
// 2^f, |f| <= 1/32.
template <Precision kPrecision, class D, class V>
HWY_INLINE V small_power(D d, V f) {
  if constexpr (kPrecision == Precision::kBf16) {
    return sv::MulAdd(f, hn::Set(d, 0.6932f), hn::Set(d, 1.000117f));
  }
  auto p = sv::MulAdd(f, hn::Set(d, 0.0555021364f), hn::Set(d, 0.240234288f));
  p = sv::MulAdd(p, f, hn::Set(d, 0.693147183f));
  return sv::MulAdd(p, f, hn::Set(d, 1.0f));
}
#else
inline constexpr float kPowerSteps = 1;

// 2^k for the whole number k in the lower bits.
template <class D, class V>
HWY_INLINE V power_of(D d, V shifted) {
  const hn::RebindToUnsigned<D> du;
  return sv::BitCast(d, sv::ShiftLeft<23>(sv::Add(sv::BitCast(du, shifted), hn::Set(du, 127))));
}
// 2^f, |f| <= 1/2.
template <Precision kPrecision, class D, class V>
HWY_INLINE V small_power(D d, V f) {
  auto p = sv::MulAdd(f, hn::Set(d, 0.0013276472f), hn::Set(d, 0.009675541f));
  p = sv::MulAdd(p, f, hn::Set(d, 0.05550713f));
  p = sv::MulAdd(p, f, hn::Set(d, 0.2402212f));
  p = sv::MulAdd(p, f, hn::Set(d, 0.69314694f));
  return sv::MulAdd(p, f, hn::Set(d, 1.0f));
}
#endif

// exp(sign x) = fraction * power for kExpZero <= sign x <= kExpInfinite, in full to 2e-7 and
// 2e-8 |x| of itself: power is the nearest 2^(k / kPowerSteps), and the fraction, which hands on
// NaN, a polynomial.
template <class V>
struct ExpParts {
  V fraction, power;
};
template <int kSign, Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE ExpParts<V> exp_parts(D d, V x) {
  const auto log2e = hn::Set(d, kSign * 1.44269504f);
  // Adding 1.5 * 2^23 steps rounds to a whole number of steps, which then stands in the lower bits.
  const auto shift = hn::Set(d, 12582912.0f / kPowerSteps);
  const auto shifted = sv::MulAdd(x, log2e, shift);
  const auto f = sv::MulSub(x, log2e, sv::Sub(shifted, shift));
  return {small_power<kPrecision>(d, f), power_of(d, shifted)};
}

// 1 + exp(-x). Min and Max return a NaN that comes second.
template <Precision kPrecision, class D, class V>
HWY_INLINE V one_plus_exp_of_negative(D d, V x) {
  x = sv::Min(hn::Set(d, -kExpZero - 1), sv::Max(hn::Set(d, -kExpInfinite), x));
  const auto e = exp_parts<-1, kPrecision>(d, x);
  return sv::MulAdd(e.fraction, e.power, hn::Set(d, 1.0f));
}

// y / x
template <Precision kPrecision, class Y, class X>
HWY_INLINE X quotient(const Y& y, const X& x) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kPrecision == Precision::kBf16) {
    const auto inverse = [](const auto& v) HWY_ATTR {
      auto out = v;
      asm("vrcp14ps %1, %0" : "=v"(out.raw) : "v"(v.raw));
      return out;
    };
    return sv::Mul(y, side_by_side(inverse, x));
  }
#endif
  return sv::Div(y, x);
}

// log(1 + e) for 0 <= e <= 1, to 1e-7 of itself.
#if HWY_TARGET == HWY_AVX3
template <class D, class V>
HWY_INLINE V log1p_of_fraction(D d, V e) {
  alignas(64) static constexpr float kInverses[16] = {
      1.0f,         0.941176474f, 0.888888896f, 0.842105269f, 0.800000012f, 0.761904776f,
      0.727272749f, 0.695652187f, 0.666666687f, 0.639999986f, 0.615384638f, 0.592592597f,
      0.571428597f, 0.551724136f, 0.533333361f, 0.516129017f};
  alignas(64) static constexpr float kLogs[16] = {
      0.0f,         0.0606246218f, 0.117783032f, 0.171850264f, 0.223143548f, 0.271933705f,
      0.318453729f, 0.362905502f,  0.405465096f, 0.446287096f, 0.485507816f, 0.523248136f,
      0.559615791f, 0.594707131f,  0.628608644f, 0.66139847f};
  // By way of the nearest j/16 up to 15/16: log(1 + j/16) + log(1 + r), r = (e - j/16) / (1 + j/16)
  // within 1/31.
  const hn::RebindToUnsigned<D> du;
  const auto shift = hn::Set(d, 786432.0f);
  const auto last = hn::BitCast(du, hn::Set(d, 786432.0f + 15.0f / 16));
  const auto j = sv::Min(last, sv::BitCast(du, sv::Add(e, shift)));
  const auto r = sv::Mul(sv::Sub(e, sv::Sub(sv::BitCast(d, j), shift)), entries(kInverses, j));
  auto p = sv::MulAdd(r, hn::Set(d, -0.25018444f), hn::Set(d, 0.333505857f));
  p = sv::MulAdd(p, r, hn::Set(d, -0.49999997f));
  return sv::Add(entries(kLogs, j), sv::MulAdd(p, sv::Mul(r, r), r));
}
#else
template <class D, class V>
HWY_INLINE V log1p_of_fraction(D d, V e) {
  auto p = sv::MulAdd(e, hn::Set(d, 0.005232694f), hn::Set(d, -0.029505238f));
  p = sv::MulAdd(p, e, hn::Set(d, 0.07822595f));
  p = sv::MulAdd(p, e, hn::Set(d, -0.13663246f));
  p = sv::MulAdd(p, e, hn::Set(d, 0.19106007f));
  p = sv::MulAdd(p, e, hn::Set(d, -0.24842982f));
  p = sv::MulAdd(p, e, hn::Set(d, 0.33319098f));
  p = sv::MulAdd(p, e, hn::Set(d, -0.49999493f));
  return sv::Mul(e, sv::MulAdd(p, e, hn::Set(d, 1.0f)));
}
#endif
#endif  // GDN_SIMD_FUSED

// exp(x) for x up to 80. Highway's Exp turns a NaN into 0; a kernel must hand it on, or a diverged
// model looks healthy. Far above 80 it may return garbage instead of infinity, so callers keep
// their arguments small. Results below the normal range may be 0.
template <class D, class V>
HWY_INLINE V exp_of(D d, V x) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    // 2^(k/16) e^r with |r| <= ln(2)/32, and e^r by a polynomial of degree 3. Min and Max return
    // their second operand where one is NaN.
    x = sv::Min(hn::Set(d, kExpInfinite), sv::Max(hn::Set(d, kExpZero), x));
    const auto shift = hn::Set(d, 12582912.0f / kPowerSteps);
    const auto shifted = sv::MulAdd(x, hn::Set(d, 1.44269504f), shift);
    const auto n = sv::Sub(shifted, shift);
    auto r = sv::NegMulAdd(n, hn::Set(d, 0.693359375f), x);  // ln(2) in two parts
    r = sv::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
    auto p = sv::MulAdd(r, hn::Set(d, 0.166660733f), hn::Set(d, 0.500016228f));
    p = sv::MulAdd(p, r, hn::Set(d, 1.0f));
    return sv::Mul(sv::MulAdd(p, r, hn::Set(d, 1.0f)), power_of(d, shifted));
  }
#endif
  return sv::IfThenElse(sv::IsNaN(x), x, sv::Exp(d, x));
}

// Results below the normal range may be 0.
template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE V sigmoid(D d, V x) {
  const auto one = hn::Set(d, 1);
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    return quotient<kPrecision>(one, one_plus_exp_of_negative<kPrecision>(d, x));
  }
#endif
  // By exp(-|x|), which cannot overflow and keeps the relative precision of small results.
  const auto e = exp_of(d, sv::Neg(sv::Abs(x)));
  return sv::Div(sv::IfThenElse(sv::Lt(x, hn::Zero(d)), e, one), sv::Add(one, e));
}

// x sigmoid(x)
template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE V silu(D d, V x) {
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    return quotient<kPrecision>(x, one_plus_exp_of_negative<kPrecision>(d, x));
  }
#endif
  return sv::Mul(x, sigmoid(d, x));
}

// sigmoid(x) and 1 - sigmoid(x); coarse ones of an x below the smallest are those of that. Filled
// in place: GCC would copy several vectors by way of memory.
inline constexpr float kSmallestForRest = -87.0f;
template <class V>
struct SigmoidParts {
  V s, rest;
};
template <Precision kPrecision, class D, class V>
HWY_INLINE SigmoidParts<V> sigmoid_parts(D d, V x) {
  const auto one = hn::Set(d, 1);
#if HWY_TARGET == HWY_AVX3
  if constexpr (kPrecision == Precision::kBf16) {
    // A coarse sigmoid cannot be taken from 1.
    x = sv::Min(hn::Set(d, -kSmallestForRest), sv::Max(hn::Set(d, kSmallestForRest), x));
    const auto of_e = exp_parts<-1, kPrecision>(d, x);
    const auto e = sv::Mul(of_e.fraction, of_e.power);
    SigmoidParts<V> parts{quotient<kPrecision>(one, sv::Add(one, e)), {}};
    parts.rest = sv::Mul(parts.s, e);
    return parts;
  }
#endif
  SigmoidParts<V> parts{sigmoid(d, x), {}};
  parts.rest = sv::Sub(one, parts.s);
  return parts;
}

// What an activation makes of x, and its derivative there.
template <class V>
struct Activation {
  V value, slope;
};

template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE Activation<V> sigmoid_and_slope(D d, V x) {
  const auto parts = sigmoid_parts<kPrecision>(d, x);
  return {parts.s, sv::Mul(parts.s, parts.rest)};
}

template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE Activation<V> silu_and_slope(D d, V x) {
  const auto parts = sigmoid_parts<kPrecision>(d, x);
  if constexpr (kPrecision == Precision::kBf16) x = sv::Max(hn::Set(d, kSmallestForRest), x);
  Activation<V> out{sv::Mul(x, parts.s), {}};
  out.slope = sv::MulAdd(out.value, parts.rest, parts.s);
  return out;
}

// log(1 + exp(x)), which is x itself above 20, and its derivative, the sigmoid.
template <class D, class V>
HWY_INLINE Activation<V> softplus_and_slope(D d, V x) {
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    const auto one = hn::Set(d, 1), zero = hn::Zero(d);
    const auto parts = exp_parts<1>(d, sv::Max(hn::Set(d, kExpZero), sv::Neg(sv::Abs(x))));
    const auto e = sv::Mul(parts.fraction, parts.power);
    return {sv::Add(sv::Max(zero, x), log1p_of_fraction(d, e)),
            sv::Div(sv::IfThenElse(sv::Lt(x, zero), e, one), sv::Add(one, e))};
  }
#endif
  const auto limit = hn::Set(d, 20);
  const auto above = sv::Gt(x, limit);
  const auto soft = sv::Log1p(d, exp_of(d, sv::Min(x, limit)));
  return {sv::IfThenElse(sv::Or(above, sv::IsNaN(x)), x, soft),
          sv::IfThenElse(above, hn::Set(d, 1), sigmoid(d, x))};
}

template <class D, class V>
HWY_INLINE V softplus(D d, V x) {
  return softplus_and_slope(d, x).value;
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#undef GDN_SIMD_FUSED

#endif  // toggling include guard
