// SPDX-License-Identifier: Apache-2.0
// One token of one value head, as the token-by-token forms use it. Include inside the
// foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_TOKEN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_TOKEN_INL_H_
#undef GDN_KERNELS_DELTA_RULE_TOKEN_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_TOKEN_INL_H_
#endif

#include "gdn/kernels/delta_rule/core-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// The state S before the token is read with `erase` and `query`, which hold its decay where the
// read comes after it; the token then makes S <- decay S + k u^T (+ p r^T in the separate form).
template <typename T>
struct Token {
  Token() = default;
  Token(const DeltaRuleParams& params, size_t Kp, size_t Vp, Carver& carve)
      : decay(carve.take<T>(Kp)),
        erase(carve.take<T>(Kp)),
        query(carve.take<T>(Kp)),
        k(carve.take<T>(Kp)),
        p(params.erase == DeltaErase::kSeparate ? carve.take<T>(Kp) : nullptr),
        v(carve.take<T>(Vp)),
        beta(carve.take<T>(Vp)),
        r(carve.take<T>(Vp)),
        y(carve.take<T>(Vp)) {}

  void load(const DeltaRuleParams& x, int64_t t, int64_t hv, size_t Kp, size_t Vp) {
    const Tag<T> d;
    const int64_t key = (t * x.H + hv / (x.HV / x.H)) * x.K, row = t * x.HV + hv;
    const auto keys = [&](const void* src, T* dst) {
      load_row(x.dtype, src, key, x.K, dst);
      std::fill(dst + x.K, dst + Kp, T(0));
    };
    keys(x.q, query);
    keys(x.k, k);
    if (delta_rule::has_a(x.erase)) keys(x.a, erase);
    if (x.erase == DeltaErase::kSeparate) {
      keys(x.p, p);
      pq = dot(Kp, p, query);
    }
    const auto factors = lengths(x.l2norm_qk, Kp);
    kq *= factors.q * factors.k;
    pq *= factors.q;
    load_row(x.dtype, x.v, row * x.V, x.V, v);
    std::fill(v + x.V, v + Vp, T(0));
    const T* betas = static_cast<const T*>(x.beta);
    if (x.channel_beta) {
      std::copy_n(betas + row * x.V, x.V, beta);
    } else {
      std::fill_n(beta, x.V, betas != nullptr ? betas[row] : T(1));
    }
    std::fill(beta + x.V, beta + Vp, T(0));
    const T* g = static_cast<const T*>(x.g);
    const T* erased = x.erase == DeltaErase::kKey ? k : erase;
    const T own = x.erase == DeltaErase::kKey ? factors.k : T(1);
    if (x.gate == DeltaGate::kChannel) {
      std::copy_n(g + row * x.K, x.K, decay);
      std::fill(decay + x.K, decay + Kp, T(0));
    } else {
      std::fill_n(decay, hn::Lanes(d), x.gate == DeltaGate::kScalar ? g[row] : T(0));
    }
    // What reads the state after its decay takes the decay along.
    auto e = hn::Exp(d, hn::Load(d, decay));
    for (size_t i = 0; i < Kp; i += hn::Lanes(d)) {
      if (x.gate == DeltaGate::kChannel) e = hn::Exp(d, hn::Load(d, decay + i));
      hn::Store(e, d, decay + i);
      multiply(e, factors.q, query + i, query + i);
      if (x.erase == DeltaErase::kKey || x.erase == DeltaErase::kOwn) {
        multiply(e, own, erased + i, erase + i);
      }
      if (x.l2norm_qk) multiply(hn::Set(d, factors.k), T(1), k + i, k + i);
    }
  }

  // From what was read for columns [j, j + n): turns v into u and y into the output.
  void solve(const DeltaRuleParams& x, size_t j, size_t n) {
    const Tag<T> d;
    const auto alpha = hn::Set(d, kq), gamma = hn::Set(d, pq);
    const auto scale = hn::Set(d, static_cast<T>(x.scale));
    for (const size_t end = j + n; j < end; j += hn::Lanes(d)) {
      auto u = hn::Load(d, v + j);
      const auto read = hn::Load(d, r + j);
      auto out = hn::Load(d, y + j);
      if (x.erase == DeltaErase::kSeparate) {
        out = hn::MulAdd(gamma, read, out);
      } else {
        if (x.erase != DeltaErase::kNone) u = hn::Sub(u, read);
        u = hn::Mul(hn::Load(d, beta + j), u);
        hn::Store(u, d, v + j);
      }
      out = hn::MulAdd(alpha, u, out);
      hn::Store(hn::Mul(scale, out), d, y + j);
    }
  }

  T *decay = nullptr, *erase = nullptr, *query = nullptr, *k = nullptr, *p = nullptr;  // [Kp]
  T *v = nullptr, *beta = nullptr;  // [Vp]: v, then u
  T *r = nullptr, *y = nullptr;     // [Vp]: S^T erase; S^T query, then o
  T kq = T(0), pq = T(0);

 private:
  // One over the lengths of q and k, or 1; and kq, of the rows as they came. All sums go side by
  // side.
  struct Factors {
    T q, k;
  };
  HWY_INLINE Factors lengths(bool normalize, size_t Kp) {
    const Tag<T> d;
    auto qq = hn::Zero(d), kk = hn::Zero(d), both = hn::Zero(d);
    for (size_t i = 0; i < Kp; i += hn::Lanes(d)) {
      const auto q_part = hn::Load(d, query + i), k_part = hn::Load(d, k + i);
      both = hn::MulAdd(q_part, k_part, both);
      qq = hn::MulAdd(q_part, q_part, qq);
      kk = hn::MulAdd(k_part, k_part, kk);
    }
    kq = hn::GetLane(hn::SumOfLanes(d, both));
    if (!normalize) return {T(1), T(1)};
    const auto inverse = [&](auto sum) HWY_ATTR {
      const T squares = hn::GetLane(hn::SumOfLanes(d, sum));
      return T(1) / std::sqrt(squares + T(delta_rule::kL2NormEps));
    };
    return {inverse(qq), inverse(kk)};
  }
  static HWY_INLINE void multiply(hn::Vec<Tag<T>> factor, T s, const T* x, T* y) {
    const Tag<T> d;
    hn::Store(hn::Mul(hn::Mul(factor, hn::Set(d, s)), hn::Load(d, x)), d, y);
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
