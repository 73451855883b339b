// SPDX-License-Identifier: Apache-2.0
// Vectors side by side, and Highway's operations on them. Included once per SIMD target, hence the
// toggling guard.
#if defined(GDN_KERNELS_SIMD_SEVERAL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_SEVERAL_INL_H_
#undef GDN_KERNELS_SIMD_SEVERAL_INL_H_
#else
#define GDN_KERNELS_SIMD_SEVERAL_INL_H_
#endif

#include <algorithm>
#include <type_traits>
#include <utility>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

// For lambdas that must not stay calls, whatever a function has grown to: what they return would go
// through memory.
#undef GDN_INLINE_ATTR
#define GDN_INLINE_ATTR HWY_ATTR __attribute__((always_inline))

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// kN vectors (or masks) that take each operation one after the other. A chain of 20 dependent
// operations per vector, each vector's in turn, fills the registers that a processor has for
// results under way (some 160 on Zen 4) with what waits, and its units idle. Side by side, what
// comes next is ready when it is fetched.
template <class X, int kN>
struct Several {
  X v[kN];
  HWY_INLINE X& operator[](int j) { return v[j]; }
  HWY_INLINE const X& operator[](int j) const { return v[j]; }
};

// As many as it takes to keep the units busy, and as registers can hold beside what is made of
// them.
inline constexpr int kSideBySide = HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3 ? 2 : 4;

template <class X>
inline constexpr int kCountOf = 0;
template <class X, int kN>
inline constexpr int kCountOf<Several<X, kN>> = kN;

// Number j of several, or what all of them share.
template <int kJ, class X>
HWY_INLINE const X& part(const X& x) {
  return x;
}
template <int kJ, class X, int kN>
HWY_INLINE const X& part(const Several<X, kN>& x) {
  return x.v[kJ];
}

// Loops whose counter is a constant in each turn, as std::integral_constant: GCC keeps the elements
// of a Several in registers only if no index into it is a variable when it looks, which is before
// it unrolls loops.
template <class F, int... kJ>
HWY_INLINE auto several_of(std::integer_sequence<int, kJ...>, const F& f) {
  using Result = decltype(f(std::integral_constant<int, 0>()));
  return Several<Result, sizeof...(kJ)>{{f(std::integral_constant<int, kJ>())...}};
}
// f(0), f(1), ..., f(kN - 1)
template <int kN, class F>
HWY_INLINE auto several(const F& f) {
  return several_of(std::make_integer_sequence<int, kN>(), f);
}
template <class F, int... kJ>
HWY_INLINE void for_each_of(std::integer_sequence<int, kJ...>, const F& f) {
  (f(std::integral_constant<int, kJ>()), ...);
}
// Calls f(0), f(1), ..., f(kN - 1).
template <int kN, class F>
HWY_INLINE void for_each(const F& f) {
  for_each_of(std::make_integer_sequence<int, kN>(), f);
}

// f(x...) for each of the several vectors among its arguments, or once where all are single.
template <class F, class... X>
HWY_INLINE auto side_by_side(const F& f, const X&... x) {
  constexpr int kN = std::max({kCountOf<X>...});
  if constexpr (kN == 0) {
    return f(x...);
  } else {
    return several<kN>([&](auto j) GDN_INLINE_ATTR { return f(part<j.value>(x)...); });
  }
}

// Highway's operations of the same names, on one vector or several side by side.
namespace sv {

#define GDN_SIDE_BY_SIDE(Op)                          \
  struct Op##Each {                                   \
    template <class... V>                             \
    HWY_INLINE auto operator()(const V&... v) const { \
      return hn::Op(v...);                            \
    }                                                 \
  };                                                  \
  template <class... X>                               \
  HWY_INLINE auto Op(const X&... x) {                 \
    return side_by_side(Op##Each(), x...);            \
  }
GDN_SIDE_BY_SIDE(Abs)
GDN_SIDE_BY_SIDE(Add)
GDN_SIDE_BY_SIDE(BitCast)
GDN_SIDE_BY_SIDE(Div)
GDN_SIDE_BY_SIDE(Exp)
GDN_SIDE_BY_SIDE(Gt)
GDN_SIDE_BY_SIDE(IfThenElse)
GDN_SIDE_BY_SIDE(IsNaN)
GDN_SIDE_BY_SIDE(Log1p)
GDN_SIDE_BY_SIDE(Lt)
GDN_SIDE_BY_SIDE(Max)
GDN_SIDE_BY_SIDE(Min)
GDN_SIDE_BY_SIDE(Mul)
GDN_SIDE_BY_SIDE(MulAdd)
GDN_SIDE_BY_SIDE(MulSub)
GDN_SIDE_BY_SIDE(Neg)
GDN_SIDE_BY_SIDE(NegMulAdd)
GDN_SIDE_BY_SIDE(Or)
GDN_SIDE_BY_SIDE(Sub)
#undef GDN_SIDE_BY_SIDE

template <int kBits, class X>
HWY_INLINE auto ShiftLeft(const X& x) {
  return side_by_side([](const auto& v) GDN_INLINE_ATTR { return hn::ShiftLeft<kBits>(v); }, x);
}

}  // namespace sv

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#endif  // toggling include guard
