// SPDX-License-Identifier: Apache-2.0
// Lanes are channels; a task walks along the tokens of one sequence with tiles of channels.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/mixers/rwkv4/kernel.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include <algorithm>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/rows.h"
#include "gdn/kernels/sequences.h"
#include "gdn/kernels/simd/scan-inl.h"
#include "gdn/mixers/rwkv4/kernel.h"

#ifndef GDN_RWKV4_KERNEL_ONCE  // what does not depend on the SIMD target
#define GDN_RWKV4_KERNEL_ONCE
namespace gdn::wkv {

inline constexpr double kNothing = -1e38;  // the largest exponent of no terms at all

}  // namespace gdn::wkv
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

inline constexpr int64_t kTile = kScanTile;
// Tokens to fetch ahead: a token's channels lie too far behind the last one's to be guessed.
inline constexpr int64_t kAhead = 8;

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

// One that this call has stored.
template <class D, typename A>
HWY_INLINE WkvState<hn::Vec<D>> kept_state(D d, const A* tile, int64_t i) {
  return {hn::LoadU(d, tile + i), hn::LoadU(d, tile + kTile + i),
          hn::LoadU(d, tile + 2 * kTile + i)};
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
  const auto e = exp_nonpositive(d, hn::Neg(hn::Abs(diff)));
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

// A task's tiles go along the tokens together, so that memory is read in large pieces: whole rows
// where one task has all tiles. Their states stay in L1.
template <typename T>
void forward(const WkvParams& p, T* y, Acc<T>* final_state, Acc<T>* saved) {
  using A = Acc<T>;
  const int64_t C = p.channels, tiles = (C + kTile - 1) / kTile;
  parallel_for(0, p.num_sequences * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<A> states(std::min(tiles, end - begin) * 3 * kTile);
    for (int64_t task = begin, count = 0; task < end; task += count) {
      const int64_t n = task / tiles, from = task % tiles;
      count = std::min(tiles - from, end - task);
      const TokenSpan seq = sequence_span(p, n);
      const A* initial = static_cast<const A*>(p.initial);
      if (initial != nullptr) initial += n * 3 * C;
      A* keep = saved == nullptr ? nullptr : saved + first_chunk(p, n, kWkvChunk) * 3 * C;
      // f(d, c, i, state) for the channels c of tile j, at i within it
      const auto for_channels = [&](int64_t j, auto&& f) HWY_ATTR {
        const int64_t first = (from + j) * kTile;
        for_lanes<A>(std::min(kTile, C - first), [&](auto d, int64_t i) HWY_ATTR {
          f(d, first + i, i, states.data() + j * 3 * kTile);
        });
      };
      for (int64_t j = 0; j < count; ++j) {
        for_channels(j, [&](auto d, int64_t c, int64_t i, A* state) HWY_ATTR {
          store_state(d, load_state(d, initial, C, c), state, kTile, i);
        });
      }
      for (int64_t t = seq.begin; t < seq.end; t += kWkvChunk) {
        const int64_t rows = std::min(seq.end - t, kWkvChunk);
        for (int64_t j = 0; keep != nullptr && j < count; ++j) {
          for_channels(j, [&](auto d, int64_t c, int64_t i, A* state) HWY_ATTR {
            store_state(d, load_state(d, state, kTile, i), keep, C, c);
          });
        }
        for (int64_t r = t; r < t + rows; ++r) {
          const T* k_row = static_cast<const T*>(p.k) + r * C;
          const T* v_row = static_cast<const T*>(p.v) + r * C;
          const int64_t ahead = (std::min(r + kAhead, seq.end - 1) - r) * C;
          for (int64_t j = 0; j < count; ++j) {
            for_channels(j, [&](auto d, int64_t c, int64_t i, A* state) HWY_ATTR {
              __builtin_prefetch(k_row + ahead + c);
              __builtin_prefetch(v_row + ahead + c);
              const auto w = hn::LoadU(d, static_cast<const A*>(p.w) + c);
              const auto u = hn::LoadU(d, static_cast<const A*>(p.u) + c);
              const auto k = load_as(d, k_row + c), v = load_as(d, v_row + c);
              auto s = kept_state(d, state, i);
              store_as(d, read(d, s, u, k, v), y + r * C + c);
              advance(d, s, w, k, v);
              store_state(d, s, state, kTile, i);
            });
          }
        }
        if (keep != nullptr) keep += 3 * C;
      }
      for (int64_t j = 0; final_state != nullptr && j < count; ++j) {
        for_channels(j, [&](auto d, int64_t c, int64_t i, A* state) HWY_ATTR {
          store_state(d, load_state(d, state, kTile, i), final_state + n * 3 * C, C, c);
        });
      }
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

// What backward needs of one chunk for a tile of channels: k, v, dy, dk, dv [kWkvChunk, kTile], and
// the states before each token, for one vector of channels.
template <typename A>
struct WkvGradTile {
  std::vector<A> k, v, dy, dk, dv, states;
  WkvGradTile()
      : k(kWkvChunk * kTile),
        v(k.size()),
        dy(k.size()),
        dk(k.size()),
        dv(k.size()),
        states(3 * k.size()) {}
};

// What a tile carries along the tokens: gradients [4, kTile] and sums [kTile].
template <typename A>
struct WkvWalk {
  A grad[4 * kTile] = {}, dw[kTile] = {}, du[kTile] = {};
};

template <class D, typename A>
HWY_INLINE void store_gradient(D d, const WkvGradState<hn::Vec<D>>& g, A* to, int64_t i) {
  hn::StoreU(g.gp, d, to + i);
  hn::StoreU(g.gq, d, to + kTile + i);
  hn::StoreU(g.o, d, to + 2 * kTile + i);
  hn::StoreU(g.largest, d, to + 3 * kTile + i);
}
template <class D, typename A>
HWY_INLINE WkvGradState<hn::Vec<D>> load_gradient(D d, const A* from, int64_t i) {
  return {hn::LoadU(d, from + i), hn::LoadU(d, from + kTile + i),
          hn::LoadU(d, from + 2 * kTile + i), hn::LoadU(d, from + 3 * kTile + i)};
}

// Backward over `rows` tokens of the channels at i of a tile, from the state `s` before them. Per
// token, with the state before it:
//   dv = e^k gP + r b,  dk = e^k (v gP + gQ) + r b (v - y),  du += r b (v - y),
//   dw += e^w (P gP + Q gQ),  gP <- e^w gP + r e^-m,  gQ <- e^w gQ - y r e^-m,
// where r = dy / (a q + b) and a, b, m weigh state and token in y. Every exponent is <= 0, because
// that of the gradients is at most minus that of any term before. d_final: of the state after the
// sequence, or null, where these are its last tokens.
template <class D, typename A>
HWY_INLINE void unwind(D d, int64_t i, int64_t rows, hn::Vec<D> w, hn::Vec<D> u,
                       WkvState<hn::Vec<D>> s, bool last, const A* d_final, int64_t channels,
                       int64_t c, WkvGradTile<A>& tile, WkvWalk<A>& walk) {
  using V = hn::Vec<D>;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t r = 0; r < rows; ++r) {
    store_state(d, s, tile.states.data() + r * 3 * lanes, lanes, 0);
    advance(d, s, w, hn::LoadU(d, tile.k.data() + r * kTile + i),
            hn::LoadU(d, tile.v.data() + r * kTile + i));
  }
  auto grad = last ? start_gradient(d, s, d_final, channels, c) : load_gradient(d, walk.grad, i);
  V dw = hn::LoadU(d, walk.dw + i), du = hn::LoadU(d, walk.du + i);
  for (int64_t r = rows - 1; r >= 0; --r) {
    const V k = hn::LoadU(d, tile.k.data() + r * kTile + i);
    const V v = hn::LoadU(d, tile.v.data() + r * kTile + i);
    const V dy = hn::LoadU(d, tile.dy.data() + r * kTile + i);
    const A* at = tile.states.data() + r * 3 * lanes;
    const WkvState<V> before{hn::LoadU(d, at), hn::LoadU(d, at + lanes),
                             hn::LoadU(d, at + 2 * lanes)};
    const auto e = weigh(d, before.o, hn::Add(u, k));
    const V inverse = hn::Div(hn::Set(d, 1), hn::MulAdd(e.a, before.q, e.b));
    const V y = hn::Mul(hn::MulAdd(e.a, before.p, hn::Mul(e.b, v)), inverse);
    const V share = hn::Mul(dy, inverse), own = hn::Mul(share, e.b);
    const V bonus = hn::Mul(own, hn::Sub(v, y));
    const V ek = exp_nonpositive(d, hn::Add(k, grad.o));
    hn::StoreU(hn::MulAdd(ek, grad.gp, own), d, tile.dv.data() + r * kTile + i);
    // the exponent that the state keeps is its own or the token's
    const V aged = hn::Add(before.o, w);
    const auto keeps = hn::Ge(aged, k);
    const V dk = hn::MulAdd(ek, hn::MulAdd(v, grad.gp, grad.gq), bonus);
    hn::StoreU(hn::Add(dk, hn::IfThenZeroElse(keeps, grad.largest)), d,
               tile.dk.data() + r * kTile + i);
    grad.largest = hn::IfThenElseZero(keeps, grad.largest);
    const V ew = exp_nonpositive(d, hn::Add(aged, grad.o));
    dw = hn::MulAdd(ew, hn::MulAdd(before.p, grad.gp, hn::Mul(before.q, grad.gq)), dw);
    dw = hn::Add(dw, grad.largest);
    du = hn::Add(du, bonus);
    const auto next = weigh(d, hn::Add(w, grad.o), hn::Neg(e.m));
    const V fresh = hn::Mul(next.b, share);
    grad.gp = hn::MulAdd(next.a, grad.gp, fresh);
    grad.gq = hn::NegMulAdd(fresh, y, hn::Mul(next.a, grad.gq));
    grad.o = next.m;
  }
  store_gradient(d, grad, walk.grad, i);
  hn::StoreU(dw, d, walk.dw + i);
  hn::StoreU(du, d, walk.du + i);
}

// Sequence n of the `count` tiles from `from` on, together as in forward.
template <typename T>
void unwind_sequence(const WkvParams& p, int64_t n, int64_t from, int64_t count,
                     const Acc<T>* saved, const WkvGrads& g, WkvGradTile<Acc<T>>& tile,
                     WkvWalk<Acc<T>>* walks) {
  using A = Acc<T>;
  const int64_t C = p.channels;
  const TokenSpan seq = sequence_span(p, n);
  const A* d_final = g.d_final == nullptr ? nullptr : static_cast<const A*>(g.d_final) + n * 3 * C;
  const A* initial = p.initial == nullptr ? nullptr : static_cast<const A*>(p.initial) + n * 3 * C;
  for (int64_t chunk = chunks_of(seq, kWkvChunk) - 1; chunk >= 0; --chunk) {
    const int64_t t = seq.begin + chunk * kWkvChunk, rows = std::min(seq.end - t, kWkvChunk);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = (from + j) * kTile, width = std::min(kTile, C - first);
      const int64_t at = t * C + first;
      load_block(static_cast<const T*>(p.k) + at, C, rows, width, tile.k.data());
      load_block(static_cast<const T*>(p.v) + at, C, rows, width, tile.v.data());
      if (g.dy != nullptr)
        load_block(static_cast<const T*>(g.dy) + at, C, rows, width, tile.dy.data());
      for_lanes<A>(width, [&](auto d, int64_t i) HWY_ATTR {
        unwind(d, i, rows, hn::LoadU(d, static_cast<const A*>(p.w) + first + i),
               hn::LoadU(d, static_cast<const A*>(p.u) + first + i),
               load_state(d, saved + chunk * 3 * C, C, first + i), t + rows == seq.end, d_final, C,
               first + i, tile, walks[j]);
      });
      store_block(tile.dk.data(), C, rows, width, static_cast<T*>(g.dk) + at);
      store_block(tile.dv.data(), C, rows, width, static_cast<T*>(g.dv) + at);
    }
  }
  for (int64_t j = 0; g.d_initial != nullptr && j < count; ++j) {
    const int64_t first = (from + j) * kTile;
    for_lanes<A>(std::min(kTile, C - first), [&](auto d, int64_t i) HWY_ATTR {
      using V = hn::Vec<decltype(d)>;
      const auto before = load_state(d, initial, C, first + i);
      const auto grad = seq.begin == seq.end ? start_gradient(d, before, d_final, C, first + i)
                                             : load_gradient(d, walks[j].grad, i);
      const auto seen = hn::Ne(before.q, hn::Zero(d));
      const V e0 = hn::IfThenElseZero(seen, exp_nonpositive(d, hn::Add(before.o, grad.o)));
      const V dp = hn::Mul(e0, grad.gp), dq = hn::Mul(e0, grad.gq);
      const V d_o = hn::Add(hn::MulAdd(before.p, dp, hn::Mul(before.q, dq)),
                            hn::IfThenElseZero(seen, grad.largest));
      store_state(d, WkvState<V>{dp, dq, d_o}, static_cast<A*>(g.d_initial) + n * 3 * C, C,
                  first + i);
    });
  }
}

template <typename T>
void backward(const WkvParams& p, const Acc<T>* saved, const WkvGrads& g) {
  using A = Acc<T>;
  const int64_t C = p.channels, tiles = (C + kTile - 1) / kTile;
  // Sums over sequences go by fixed groups of them, so that the bits do not depend on the threads.
  const RowBlocks groups(p.num_sequences, 1, 16);
  std::vector<A> partial(groups.count() * 2 * C);
  parallel_for(0, groups.count() * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    WkvGradTile<A> tile;
    for (int64_t task = begin, count = 0; task < end; task += count) {
      const int64_t group = task / tiles, from = task % tiles;
      count = std::min(tiles - from, end - task);
      std::vector<WkvWalk<A>> walks(count);
      for (int64_t n = groups.begin(group); n < groups.end(group); ++n)
        unwind_sequence<T>(p, n, from, count, saved + first_chunk(p, n, kWkvChunk) * 3 * C, g, tile,
                           walks.data());
      for (int64_t j = 0; j < count; ++j) {
        const int64_t first = (from + j) * kTile, width = std::min(kTile, C - first);
        std::copy_n(walks[j].dw, width, partial.data() + group * 2 * C + first);
        std::copy_n(walks[j].du, width, partial.data() + (group * 2 + 1) * C + first);
      }
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
