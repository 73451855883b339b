// SPDX-License-Identifier: Apache-2.0
// Lanes are channels; a task walks along the tokens of one sequence with a tile of channels.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/mixers/rwkv4/kernel.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/mixers/rwkv4/kernel.h"

#include <algorithm>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/rows.h"
#include "gdn/kernels/simd-inl.h"

#ifndef GDN_RWKV4_KERNEL_ONCE  // what does not depend on the SIMD target
#define GDN_RWKV4_KERNEL_ONCE
namespace gdn::wkv {

inline constexpr int64_t kTile = 64;       // channels: a few cache lines of each token
inline constexpr double kNothing = -1e38;  // the largest exponent of no terms at all

struct Span {
  int64_t begin, end;
};

inline Span sequence(const WkvParams& p, int64_t n) {
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  const int64_t length = p.num_sequences == 0 ? 0 : p.total_tokens / p.num_sequences;
  return {n * length, (n + 1) * length};
}

inline int64_t chunks_of(Span seq) { return (seq.end - seq.begin + kWkvChunk - 1) / kWkvChunk; }

// The row of `saved` for the first chunk of sequence n. Rows may stay unused, so that their number
// does not depend on how the tokens are cut.
inline int64_t first_chunk(const WkvParams& p, int64_t n) {
  return sequence(p, n).begin / kWkvChunk + n;
}

}  // namespace gdn::wkv
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

using wkv::kTile;
using wkv::Span;

template <class V>
struct WkvState {
  V p, q, o;
};

template <class D, typename A>
HWY_INLINE WkvState<hn::Vec<D>> load_state(D d, const A* from, int64_t channels, int64_t c) {
  WkvState<hn::Vec<D>> s{hn::Zero(d), hn::Zero(d), hn::Set(d, static_cast<A>(wkv::kNothing))};
  if (from == nullptr) return s;
  s.p = hn::LoadU(d, from + c);
  s.q = hn::LoadU(d, from + channels + c);
  s.o = hn::IfThenElse(hn::Eq(s.q, hn::Zero(d)), s.o, hn::LoadU(d, from + 2 * channels + c));
  return s;
}

template <class D, typename A>
HWY_INLINE void store_state(D d, const WkvState<hn::Vec<D>>& s, A* to, int64_t channels,
                            int64_t c) {
  hn::StoreU(s.p, d, to + c);
  hn::StoreU(s.q, d, to + channels + c);
  hn::StoreU(s.o, d, to + 2 * channels + c);
}

// e^(a - m) and e^(b - m) for m = max(a, b): one of them is 1.
template <class V>
struct Weights {
  V a, b, m;
};
template <class D, class V>
HWY_INLINE Weights<V> weigh(D d, V a, V b) {
  const auto diff = hn::Sub(a, b), one = hn::Set(d, 1);
  const auto e = exp_of(d, hn::Neg(hn::Abs(diff)));
  const auto second = hn::Lt(diff, hn::Zero(d));
  return {hn::IfThenElse(second, e, one), hn::IfThenElse(second, one, e), hn::Max(a, b)};
}

template <class D, class V>
HWY_INLINE V read(D d, const WkvState<V>& s, V u, V k, V v) {
  const auto w = weigh(d, s.o, hn::Add(u, k));
  return hn::Div(hn::MulAdd(w.a, s.p, hn::Mul(w.b, v)), hn::MulAdd(w.a, s.q, w.b));
}

template <class D, class V>
HWY_INLINE void advance(D d, WkvState<V>& s, V w, V k, V v) {
  const auto e = weigh(d, hn::Add(s.o, w), k);
  s.p = hn::MulAdd(e.a, s.p, hn::Mul(e.b, v));
  s.q = hn::MulAdd(e.a, s.q, e.b);
  s.o = e.m;
}

template <typename T>
void forward(const WkvParams& p, T* y, Acc<T>* final_state, Acc<T>* saved) {
  using A = Acc<T>;
  const int64_t C = p.channels, tiles = (C + kTile - 1) / kTile;
  const T *keys = static_cast<const T*>(p.k), *values = static_cast<const T*>(p.v);
  const A* initial = static_cast<const A*>(p.initial);
  parallel_for(0, p.num_sequences * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tiles, first = task % tiles * kTile;
      const Span seq = wkv::sequence(p, n);
      for_lanes<A>(std::min(kTile, C - first), [&](auto d, int64_t i) HWY_ATTR {
        const int64_t c = first + i;
        const auto w = hn::LoadU(d, static_cast<const A*>(p.w) + c);
        const auto u = hn::LoadU(d, static_cast<const A*>(p.u) + c);
        auto s = load_state(d, initial == nullptr ? initial : initial + n * 3 * C, C, c);
        A* keep = saved == nullptr ? nullptr : saved + wkv::first_chunk(p, n) * 3 * C;
        for (int64_t t = seq.begin; t < seq.end; ++t) {
          if (keep != nullptr && (t - seq.begin) % kWkvChunk == 0) {
            store_state(d, s, keep, C, c);
            keep += 3 * C;
          }
          const auto k = load_as(d, keys + t * C + c), v = load_as(d, values + t * C + c);
          store_as(d, read(d, s, u, k, v), y + t * C + c);
          advance(d, s, w, k, v);
        }
        if (final_state != nullptr) store_state(d, s, final_state + n * 3 * C, C, c);
      });
    }
  });
}

// The gradients of P and Q are gp e^o and gq e^o; `largest` is that of the state's exponent beyond
// its part in them.
template <class V>
struct WkvGradState {
  V gp, gq, o, largest;
};

template <class D, typename A>
HWY_INLINE WkvGradState<hn::Vec<D>> start_gradient(D d, const WkvState<hn::Vec<D>>& last,
                                                   const A* d_final, int64_t channels, int64_t c) {
  if (d_final == nullptr) {
    return {hn::Zero(d), hn::Zero(d), hn::Set(d, static_cast<A>(wkv::kNothing)), hn::Zero(d)};
  }
  const auto gp = hn::LoadU(d, d_final + c), gq = hn::LoadU(d, d_final + channels + c);
  const auto largest = hn::Sub(hn::LoadU(d, d_final + 2 * channels + c),
                               hn::MulAdd(gp, last.p, hn::Mul(gq, last.q)));
  return {gp, gq, hn::Neg(last.o), largest};
}

// Backward over sequence n for the channels at c. Per token, with the state before it:
//   dv = e^k gP + r b,  dk = e^k (v gP + gQ) + r b (v - y),  du += r b (v - y),
//   dw += e^w (P gP + Q gQ),  gP <- e^w gP + r e^-m,  gQ <- e^w gQ - y r e^-m,
// where r = dy / (a q + b) and a, b, m weigh state and token in y. Every exponent is <= 0, because
// that of the gradients is at most minus that of any term before.
template <typename T, class D>
HWY_INLINE void unwind(const WkvParams& p, D d, int64_t n, int64_t c, const Acc<T>* saved,
                       const WkvGrads& g, Acc<T>* scratch, Acc<T>* sum_w, Acc<T>* sum_u) {
  using A = Acc<T>;
  using V = hn::Vec<D>;
  const int64_t C = p.channels, lanes = hn::Lanes(d);
  const Span seq = wkv::sequence(p, n);
  const T *keys = static_cast<const T*>(p.k) + c, *values = static_cast<const T*>(p.v) + c;
  const V w = hn::LoadU(d, static_cast<const A*>(p.w) + c);
  const V u = hn::LoadU(d, static_cast<const A*>(p.u) + c);
  const A* initial = static_cast<const A*>(p.initial);
  const A* d_final = static_cast<const A*>(g.d_final);
  const auto first = load_state(d, initial == nullptr ? initial : initial + n * 3 * C, C, c);
  V dw = hn::LoadU(d, sum_w), du = hn::LoadU(d, sum_u);
  WkvGradState<V> grad =
      start_gradient(d, first, d_final == nullptr ? d_final : d_final + n * 3 * C, C, c);
  for (int64_t chunk = wkv::chunks_of(seq) - 1; chunk >= 0; --chunk) {
    const Span span{seq.begin + chunk * kWkvChunk,
                    std::min(seq.end, seq.begin + (chunk + 1) * kWkvChunk)};
    auto s = load_state(d, saved + chunk * 3 * C, C, c);
    for (int64_t t = span.begin; t < span.end; ++t) {
      store_state(d, s, scratch + (t - span.begin) * 3 * lanes, lanes, 0);
      advance(d, s, w, load_as(d, keys + t * C), load_as(d, values + t * C));
    }
    if (span.end == seq.end)
      grad = start_gradient(d, s, d_final == nullptr ? d_final : d_final + n * 3 * C, C, c);
    for (int64_t t = span.end - 1; t >= span.begin; --t) {
      const V k = load_as(d, keys + t * C), v = load_as(d, values + t * C);
      const A* at = scratch + (t - span.begin) * 3 * lanes;
      const WkvState<V> before{hn::LoadU(d, at), hn::LoadU(d, at + lanes),
                               hn::LoadU(d, at + 2 * lanes)};
      const V dy =
          g.dy == nullptr ? hn::Zero(d) : load_as(d, static_cast<const T*>(g.dy) + t * C + c);
      const auto e = weigh(d, before.o, hn::Add(u, k));
      const V inverse = hn::Div(hn::Set(d, 1), hn::MulAdd(e.a, before.q, e.b));
      const V y = hn::Mul(hn::MulAdd(e.a, before.p, hn::Mul(e.b, v)), inverse);
      const V r = hn::Mul(dy, inverse), rb = hn::Mul(r, e.b);
      const V bonus = hn::Mul(rb, hn::Sub(v, y));
      const V ek = exp_of(d, hn::Add(k, grad.o));
      store_as(d, hn::MulAdd(ek, grad.gp, rb), static_cast<T*>(g.dv) + t * C + c);
      // the exponent that the state keeps is its own or the token's
      const V aged = hn::Add(before.o, w);
      const auto own = hn::Ge(aged, k);
      const V dk = hn::MulAdd(ek, hn::MulAdd(v, grad.gp, grad.gq), bonus);
      store_as(d, hn::Add(dk, hn::IfThenZeroElse(own, grad.largest)),
               static_cast<T*>(g.dk) + t * C + c);
      grad.largest = hn::IfThenElseZero(own, grad.largest);
      const V ew = exp_of(d, hn::Add(aged, grad.o));
      dw = hn::MulAdd(ew, hn::MulAdd(before.p, grad.gp, hn::Mul(before.q, grad.gq)), dw);
      dw = hn::Add(dw, grad.largest);
      du = hn::Add(du, bonus);
      const auto next = weigh(d, hn::Add(w, grad.o), hn::Neg(e.m));
      const V fresh = hn::Mul(next.b, r);
      grad.gp = hn::MulAdd(next.a, grad.gp, fresh);
      grad.gq = hn::NegMulAdd(fresh, y, hn::Mul(next.a, grad.gq));
      grad.o = next.m;
    }
  }
  hn::StoreU(dw, d, sum_w);
  hn::StoreU(du, d, sum_u);
  if (g.d_initial == nullptr) return;
  const auto seen = hn::Ne(first.q, hn::Zero(d));
  const V e0 = hn::IfThenElseZero(seen, exp_of(d, hn::Add(first.o, grad.o)));
  const V dp = hn::Mul(e0, grad.gp), dq = hn::Mul(e0, grad.gq);
  const V d_o = hn::Add(hn::MulAdd(first.p, dp, hn::Mul(first.q, dq)),
                        hn::IfThenElseZero(seen, grad.largest));
  store_state(d, WkvState<V>{dp, dq, d_o}, static_cast<A*>(g.d_initial) + n * 3 * C, C, c);
}

template <typename T>
void backward(const WkvParams& p, const Acc<T>* saved, const WkvGrads& g) {
  using A = Acc<T>;
  const int64_t C = p.channels, tiles = (C + kTile - 1) / kTile;
  // Sums over sequences go by fixed groups of them, so that the bits do not depend on the threads.
  const RowBlocks groups(p.num_sequences, 1, 16);
  std::vector<A> partial(groups.count() * 2 * C);
  parallel_for(0, groups.count() * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<A> scratch(kWkvChunk * 3 * hn::Lanes(hn::ScalableTag<A>()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / tiles, first = task % tiles * kTile;
      A* sums = partial.data() + group * 2 * C;
      for_lanes<A>(std::min(kTile, C - first), [&](auto d, int64_t i) HWY_ATTR {
        const int64_t c = first + i;
        for (int64_t n = groups.begin(group); n < groups.end(group); ++n)
          unwind<T>(p, d, n, c, saved + wkv::first_chunk(p, n) * 3 * C, g, scratch.data(), sums + c,
                    sums + C + c);
      });
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    A dw = 0, du = 0;
    for (int64_t group = 0; group < groups.count(); ++group) {
      dw += partial[group * 2 * C + c];
      du += partial[group * 2 * C + C + c];
    }
    static_cast<A*>(g.dw)[c] = dw;
    static_cast<A*>(g.du)[c] = du;
  }
}

template <typename T>
void step(const WkvParams& p, Acc<T>* pool, const int64_t* slots, T* y) {
  using A = Acc<T>;
  const int64_t C = p.channels, chunk = 1024, chunks = (C + chunk - 1) / chunk;
  parallel_for(0, p.num_sequences * chunks, 2, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / chunks, first = task % chunks * chunk;
      const int64_t slot = slots == nullptr ? n : slots[n];
      for_lanes<A>(std::min(chunk, C - first), [&](auto d, int64_t i) HWY_ATTR {
        const int64_t c = first + i, at = n * C + c;
        if (slot < 0) {
          store_as(d, hn::Zero(d), y + at);
          return;
        }
        A* state = pool + slot * 3 * C;
        auto s = load_state(d, state, C, c);
        const auto k = load_as(d, static_cast<const T*>(p.k) + at);
        const auto v = load_as(d, static_cast<const T*>(p.v) + at);
        store_as(d, read(d, s, hn::LoadU(d, static_cast<const A*>(p.u) + c), k, v), y + at);
        advance(d, s, hn::LoadU(d, static_cast<const A*>(p.w) + c), k, v);
        store_state(d, s, state, C, c);
      });
    }
  });
}

void wkv_forward_any(const WkvParams& p, void* y, void* final_state, void* saved) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    forward<T>(p, static_cast<T*>(y), static_cast<Acc<T>*>(final_state),
               static_cast<Acc<T>*>(saved));
  });
}

void wkv_backward_any(const WkvParams& p, const void* saved, const WkvGrads& grads) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    backward<T>(p, static_cast<const Acc<T>*>(saved), grads);
  });
}

void wkv_step_any(const WkvParams& p, void* pool, const int64_t* slots, void* y) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    step<T>(p, static_cast<Acc<T>*>(pool), slots, static_cast<T*>(y));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(wkv_forward_any);
HWY_EXPORT(wkv_backward_any);
HWY_EXPORT(wkv_step_any);

namespace {

void check(const WkvParams& p) {
  GDN_CHECK(p.channels >= 1, "[wkv] channels must be at least 1, got ", p.channels);
  GDN_CHECK(
      p.cu_seqlens != nullptr || p.num_sequences == 0 || p.total_tokens % p.num_sequences == 0,
      "[wkv] without cu_seqlens total_tokens must be a multiple of num_sequences, ",
      p.num_sequences, ", got ", p.total_tokens);
}

}  // namespace

int64_t wkv_chunks(const WkvParams& p) {
  check(p);
  return p.total_tokens / kWkvChunk + p.num_sequences;
}

void wkv_forward(const WkvParams& p, void* y, void* final_state, void* saved) {
  check(p);
  HWY_DYNAMIC_DISPATCH(wkv_forward_any)(p, y, final_state, saved);
}

void wkv_backward(const WkvParams& p, const void* saved, const WkvGrads& grads) {
  check(p);
  HWY_DYNAMIC_DISPATCH(wkv_backward_any)(p, saved, grads);
}

void wkv_step(const WkvParams& p, void* pool, int64_t num_slots, const int64_t* slots, void* y) {
  check(p);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t slot = slots == nullptr ? n : slots[n];
    GDN_CHECK(slot < num_slots, "[wkv] a slot must be below the number of slots, ", num_slots,
              ", got ", slot);
  }
  HWY_DYNAMIC_DISPATCH(wkv_step_any)(p, pool, slots, y);
}

}  // namespace gdn
#endif  // HWY_ONCE
