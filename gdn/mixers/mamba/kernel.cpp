// SPDX-License-Identifier: Apache-2.0
// Lanes are channels. A task owns a tile of channels of some sequences and walks along the tokens,
// a chunk at a time, so that the states of a vector of channels stay in registers or L1.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/mixers/mamba/kernel.cpp"
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
#include "gdn/mixers/mamba/kernel.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

inline constexpr int64_t kTile = kScanTile;

// [C, S] rows of a tile to [S, kTile], so that channels lie side by side; zeros for null.
template <typename A>
void load_tile(const A* from, int64_t S, int64_t width, A* tile) {
  for (int64_t c = 0; c < width; ++c)
    for (int64_t s = 0; s < S; ++s) tile[s * kTile + c] = from == nullptr ? A{0} : from[c * S + s];
}
template <typename A>
void store_tile(const A* tile, int64_t S, int64_t width, A* to) {
  for (int64_t c = 0; c < width; ++c)
    for (int64_t s = 0; s < S; ++s) to[c * S + s] = tile[s * kTile + c];
}

// The tile of a task: its channels, A as [S, kTile], and of one chunk of tokens the inputs as
// [kScanChunk, kTile]: x, dt + dt_bias before (raw) and after softplus (dt).
template <typename T>
struct Scan {
  using A = Acc<T>;
  const SelectiveScanParams& p;
  int64_t first, width;
  std::vector<A> rate, x, raw, dt, out;

  explicit Scan(const SelectiveScanParams& p, int64_t rows = kScanChunk)
      : p(p), rate(p.states * kTile), x(rows * kTile), raw(x.size()), dt(x.size()), out(x.size()) {}

  int64_t at(int64_t t) const { return t * p.channels + first; }

  void start_tile(int64_t tile) {
    first = tile * kTile;
    width = std::min(kTile, p.channels - first);
    load_tile(static_cast<const A*>(p.A) + first * p.states, p.states, width, rate.data());
  }

  void load_chunk(TokenSpan span) {
    const int64_t rows = span.size();
    load_block(static_cast<const T*>(p.x) + at(span.begin), p.channels, rows, width, x.data());
    load_block(static_cast<const T*>(p.dt) + at(span.begin), p.channels, rows, width, raw.data());
    const A* bias = static_cast<const A*>(p.dt_bias);
    for (int64_t r = 0; r < rows; ++r) {
      for_lanes<A>(width, [&](auto d, int64_t i) HWY_ATTR {
        auto v = hn::LoadU(d, raw.data() + r * kTile + i);
        if (bias != nullptr) v = hn::Add(v, hn::LoadU(d, bias + first + i));
        hn::StoreU(v, d, raw.data() + r * kTile + i);
        hn::StoreU(p.softplus ? softplus(d, v) : v, d, dt.data() + r * kTile + i);
      });
    }
  }

  template <class D>
  HWY_INLINE hn::Vec<D> skip(D d, int64_t i) const {
    if (p.D == nullptr) return hn::Zero(d);
    return hn::LoadU(d, static_cast<const A*>(p.D) + first + i);
  }
  // exp(dt A), of which the transition is itself or 2 exp - 1.
  template <class D, class V>
  HWY_INLINE V decay(D d, V dt, int64_t s, int64_t i) const {
    return exp_nonpositive(d, hn::Mul(dt, hn::LoadU(d, rate.data() + s * kTile + i)));
  }
};

template <bool kSigned, class D, class V>
HWY_INLINE V transition(D d, V e) {
  if constexpr (kSigned) return hn::Sub(hn::Add(e, e), hn::Set(d, 1));
  return e;
}

// `rows` tokens of the channels at i, from and to the states h [S, kTile]; B and C [rows, S].
template <bool kSigned, typename T, class D>
HWY_INLINE void scan_vector(Scan<T>& in, D d, int64_t i, int64_t rows, const Acc<T>* B,
                            const Acc<T>* C, Acc<T>* HWY_RESTRICT h) {
  const int64_t S = in.p.states;
  const auto skip = in.skip(d, i);
  for (int64_t r = 0; r < rows; ++r, B += S, C += S) {
    const auto x = hn::LoadU(d, in.x.data() + r * kTile + i);
    const auto dt = hn::LoadU(d, in.dt.data() + r * kTile + i), dtx = hn::Mul(dt, x);
    auto even = hn::Mul(skip, x), odd = hn::Zero(d);
    int64_t s = 0;
    const auto one = [&](int64_t state, hn::Vec<D> sum) HWY_ATTR {
      const auto a = transition<kSigned>(d, in.decay(d, dt, state, i));
      const auto next =
          hn::MulAdd(a, hn::LoadU(d, h + state * kTile + i), hn::Mul(dtx, hn::Set(d, B[state])));
      hn::StoreU(next, d, h + state * kTile + i);
      return hn::MulAdd(next, hn::Set(d, C[state]), sum);
    };
    for (; s + 2 <= S; s += 2) {  // two sums, so that one's latency hides the other's
      even = one(s, even);
      odd = one(s + 1, odd);
    }
    if (s < S) even = one(s, even);
    hn::StoreU(hn::Add(even, odd), d, in.out.data() + r * kTile + i);
  }
}

template <typename T>
std::vector<Acc<T>> widened(const void* data, int64_t count) {
  std::vector<Acc<T>> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = load(static_cast<const T*>(data) + i);
  return out;
}

// B and C in the accumulation type: themselves where they are.
template <typename T>
struct Widened {
  std::vector<Acc<T>> copy;
  const Acc<T>* data;
  Widened(const void* from, int64_t count) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      data = static_cast<const T*>(from);
    } else {
      copy = widened<T>(from, count);
      data = copy.data();
    }
  }
};

template <typename T, bool kSigned>
void forward(const SelectiveScanParams& p, T* y, Acc<T>* final_state, Acc<T>* saved) {
  using A = Acc<T>;
  const int64_t S = p.states, tiles = (p.channels + kTile - 1) / kTile;
  const Widened<T> B(p.B, p.total_tokens * S), C(p.C, p.total_tokens * S);
  parallel_for(0, p.num_sequences * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<A> h(S * kTile);
    Scan<T> in(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tiles;
      in.start_tile(task % tiles);
      const int64_t state = (n * p.channels + in.first) * S;
      const A* initial = static_cast<const A*>(p.initial);
      load_tile(initial == nullptr ? initial : initial + state, S, in.width, h.data());
      const TokenSpan seq = sequence_span(p, n);
      A* keep = saved == nullptr
                    ? nullptr
                    : saved + first_chunk(p, n, kScanChunk) * S * p.channels + in.first;
      for (int64_t t = seq.begin; t < seq.end; t += kScanChunk) {
        for (int64_t s = 0; keep != nullptr && s < S; ++s)
          std::copy_n(h.data() + s * kTile, in.width, keep + s * p.channels);
        if (keep != nullptr) keep += S * p.channels;
        const TokenSpan span{t, std::min(seq.end, t + kScanChunk)};
        const int64_t rows = span.size();
        in.load_chunk(span);
        for_lanes<A>(in.width, [&](auto d, int64_t i) HWY_ATTR {
          scan_vector<kSigned, T>(in, d, i, rows, B.data + t * S, C.data + t * S, h.data());
        });
        store_block(in.out.data(), p.channels, rows, in.width, y + in.at(t));
      }
      if (final_state != nullptr) store_tile(h.data(), S, in.width, final_state + state);
    }
  });
}

// What backward needs of one chunk, for one vector of channels at a time; element [t][s] is a
// vector. dB and dC gather the tile's channels lane by lane, and apart the lanes of single
// channels.
template <typename A>
struct ChunkScratch {
  std::vector<A> h, e;  // states after each token (and before), exp(dt A)
  std::vector<A> dB, dC, dB_one, dC_one;
  std::vector<A> dy, ddt;  // [kScanChunk, kTile]
  explicit ChunkScratch(int64_t S, int64_t lanes)
      : h((kScanChunk + 1) * S * lanes),
        e(kScanChunk * S * lanes),
        dB(kScanChunk * S * lanes),
        dC(dB.size()),
        dB_one(kScanChunk * S),
        dC_one(kScanChunk * S),
        dy(kScanChunk * kTile),
        ddt(dy.size()) {}
  void clear() {
    for (auto* v : {&dB, &dC, &dB_one, &dC_one}) std::fill(v->begin(), v->end(), A{0});
  }
};

// Sums over the tokens that a task has seen, [S, kTile] and [kTile].
template <typename A>
struct Sums {
  std::vector<A> dA, dD, ddt_bias;
  explicit Sums(int64_t S) : dA(S * kTile), dD(kTile), ddt_bias(kTile) {}
};

// `rows` tokens of the channels at i in reverse; `start` holds the states before them and dh the
// gradient of the states after them, which becomes that of the states before. dx goes to in.out.
template <bool kSigned, typename T, class D>
HWY_INLINE void unscan_vector(Scan<T>& in, D d, int64_t i, int64_t rows, const Acc<T>* B,
                              const Acc<T>* C, const Acc<T>* start, int64_t start_stride,
                              ChunkScratch<Acc<T>>& scratch, Acc<T>* HWY_RESTRICT dh,
                              Sums<Acc<T>>& sums) {
  using A = Acc<T>;
  const int64_t S = in.p.states, lanes = hn::Lanes(d), row = S * lanes;
  const bool whole = lanes > 1;
  A* HWY_RESTRICT h = scratch.h.data();
  A* HWY_RESTRICT e = scratch.e.data();
  for (int64_t s = 0; s < S; ++s)
    hn::StoreU(hn::LoadU(d, start + s * start_stride + i), d, h + s * lanes);
  for (int64_t r = 0; r < rows; ++r) {
    const auto dt = hn::LoadU(d, in.dt.data() + r * kTile + i);
    const auto dtx = hn::Mul(dt, hn::LoadU(d, in.x.data() + r * kTile + i));
    for (int64_t s = 0; s < S; ++s) {
      const int64_t at = r * row + s * lanes;
      const auto decay = in.decay(d, dt, s, i);
      hn::StoreU(decay, d, e + at);
      hn::StoreU(hn::MulAdd(transition<kSigned>(d, decay), hn::LoadU(d, h + at),
                            hn::Mul(dtx, hn::Set(d, B[r * S + s]))),
                 d, h + at + row);
    }
  }
  A* HWY_RESTRICT sum_B = whole ? scratch.dB.data() : scratch.dB_one.data();
  A* HWY_RESTRICT sum_C = whole ? scratch.dC.data() : scratch.dC_one.data();
  A* HWY_RESTRICT sum_A = sums.dA.data();
  const auto skip = in.skip(d, i);
  auto dD = hn::LoadU(d, sums.dD.data() + i), ddt_bias = hn::LoadU(d, sums.ddt_bias.data() + i);
  for (int64_t r = rows - 1; r >= 0; --r) {
    const auto x = hn::LoadU(d, in.x.data() + r * kTile + i);
    const auto dt = hn::LoadU(d, in.dt.data() + r * kTile + i), dtx = hn::Mul(dt, x);
    const auto dy = hn::LoadU(d, scratch.dy.data() + r * kTile + i);
    auto d_dtx = hn::Zero(d), d_rate = hn::Zero(d);
    for (int64_t s = 0; s < S; ++s) {
      const int64_t state = s * kTile + i, at = r * row + s * lanes;
      const auto decay = hn::LoadU(d, e + at);
      const auto grad = hn::MulAdd(dy, hn::Set(d, C[r * S + s]), hn::LoadU(d, dh + state));
      hn::StoreU(hn::MulAdd(dy, hn::LoadU(d, h + at + row), hn::LoadU(d, sum_C + at)), d,
                 sum_C + at);
      hn::StoreU(hn::MulAdd(grad, dtx, hn::LoadU(d, sum_B + at)), d, sum_B + at);
      d_dtx = hn::MulAdd(grad, hn::Set(d, B[r * S + s]), d_dtx);
      // of dt A, through the transition
      auto slope = hn::Mul(hn::Mul(grad, decay), hn::LoadU(d, h + at));
      if constexpr (kSigned) slope = hn::Add(slope, slope);
      d_rate = hn::MulAdd(slope, hn::LoadU(d, in.rate.data() + state), d_rate);
      hn::StoreU(hn::MulAdd(slope, dt, hn::LoadU(d, sum_A + state)), d, sum_A + state);
      hn::StoreU(hn::Mul(transition<kSigned>(d, decay), grad), d, dh + state);
    }
    auto d_dt = hn::MulAdd(d_dtx, x, d_rate);
    if (in.p.softplus) {
      const auto raw = hn::LoadU(d, in.raw.data() + r * kTile + i);
      const auto above = hn::Gt(raw, hn::Set(d, 20));
      d_dt = hn::IfThenElse(above, d_dt, hn::Mul(d_dt, sigmoid(d, raw)));
    }
    hn::StoreU(hn::MulAdd(d_dtx, dt, hn::Mul(skip, dy)), d, in.out.data() + r * kTile + i);
    hn::StoreU(d_dt, d, scratch.ddt.data() + r * kTile + i);
    dD = hn::MulAdd(dy, x, dD);
    ddt_bias = hn::Add(ddt_bias, d_dt);
  }
  hn::StoreU(dD, d, sums.dD.data() + i);
  hn::StoreU(ddt_bias, d, sums.ddt_bias.data() + i);
}

// Adds the tile's part to partial [T_total, S].
template <typename A>
HWY_INLINE void reduce_lanes(const std::vector<A>& vectors, const std::vector<A>& ones,
                             int64_t count, A* out) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t k = 0; k < count; ++k)
    out[k] = hn::GetLane(hn::SumOfLanes(d, hn::LoadU(d, vectors.data() + k * lanes))) + ones[k];
}

template <typename T, bool kSigned>
void backward(const SelectiveScanParams& p, const Acc<T>* saved, const SelectiveScanGrads& g) {
  using A = Acc<T>;
  const int64_t S = p.states, channels = p.channels, tiles = (channels + kTile - 1) / kTile;
  const Widened<T> wide_B(p.B, p.total_tokens * S), wide_C(p.C, p.total_tokens * S);
  // Sums over sequences go by fixed groups of them, and sums over channels by tiles, so that the
  // bits do not depend on the number of threads.
  const RowBlocks groups(p.num_sequences, 1, 16);
  const int64_t per_group = channels * (S + 2), tokens = p.total_tokens * S;
  std::vector<A> partial(groups.count() * per_group), dB(tiles * tokens), dC(tiles * tokens);
  parallel_for(0, groups.count() * tiles, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<A> dh(S * kTile);
    Scan<T> in(p);
    ChunkScratch<A> scratch(S, hn::Lanes(hn::ScalableTag<A>()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / tiles, tile = task % tiles;
      in.start_tile(tile);
      const int64_t first = in.first;
      Sums<A> sums(S);
      for (int64_t n = groups.begin(group); n < groups.end(group); ++n) {
        const int64_t state = (n * channels + first) * S;
        const A* d_final = static_cast<const A*>(g.d_final);
        load_tile(d_final == nullptr ? d_final : d_final + state, S, in.width, dh.data());
        const TokenSpan seq = sequence_span(p, n);
        for (int64_t c = chunks_of(seq, kScanChunk) - 1; c >= 0; --c) {
          const int64_t t = seq.begin + c * kScanChunk;
          const TokenSpan span{t, std::min(seq.end, t + kScanChunk)};
          const int64_t rows = span.end - t;
          const A* start = saved + (first_chunk(p, n, kScanChunk) + c) * S * channels + first;
          scratch.clear();
          in.load_chunk(span);
          if (g.dy != nullptr)
            load_block(static_cast<const T*>(g.dy) + in.at(t), channels, rows, in.width,
                       scratch.dy.data());
          for_lanes<A>(in.width, [&](auto d, int64_t i) HWY_ATTR {
            unscan_vector<kSigned, T>(in, d, i, rows, wide_B.data + t * S, wide_C.data + t * S,
                                      start, channels, scratch, dh.data(), sums);
          });
          store_block(in.out.data(), channels, rows, in.width, static_cast<T*>(g.dx) + in.at(t));
          store_block(scratch.ddt.data(), channels, rows, in.width,
                      static_cast<T*>(g.ddt) + in.at(t));
          reduce_lanes(scratch.dB, scratch.dB_one, rows * S, dB.data() + tile * tokens + t * S);
          reduce_lanes(scratch.dC, scratch.dC_one, rows * S, dC.data() + tile * tokens + t * S);
        }
        if (g.d_initial != nullptr)
          store_tile(dh.data(), S, in.width, static_cast<A*>(g.d_initial) + state);
      }
      A* out = partial.data() + group * per_group;
      store_tile(sums.dA.data(), S, in.width, out + first * S);
      std::copy_n(sums.dD.data(), in.width, out + channels * S + first);
      std::copy_n(sums.ddt_bias.data(), in.width, out + channels * (S + 1) + first);
    }
  });
  const auto over_groups = [&](void* out, int64_t from, int64_t count) {
    for (int64_t i = 0; out != nullptr && i < count; ++i) {
      A sum = 0;
      for (int64_t group = 0; group < groups.count(); ++group)
        sum += partial[group * per_group + from + i];
      static_cast<A*>(out)[i] = sum;
    }
  };
  over_groups(g.dA, 0, channels * S);
  over_groups(g.dD, channels * S, channels);
  over_groups(g.ddt_bias, channels * (S + 1), channels);
  const auto over_tiles = [&](const std::vector<A>& parts, void* out) {
    parallel_for(0, tokens, 4096, [&](int64_t begin, int64_t end) HWY_ATTR {
      for_lanes<A>(end - begin, [&](auto d, int64_t k) HWY_ATTR {
        auto sum = hn::LoadU(d, parts.data() + begin + k);
        for (int64_t tile = 1; tile < tiles; ++tile)
          sum = hn::Add(sum, hn::LoadU(d, parts.data() + tile * tokens + begin + k));
        store_as(d, sum, static_cast<T*>(out) + begin + k);
      });
    });
  };
  over_tiles(dB, g.dB);
  over_tiles(dC, g.dC);
}

// Lanes are states here: those of a channel lie side by side in the pool.
template <typename T, bool kSigned>
void step(const SelectiveScanParams& p, Acc<T>* pool, const int64_t* slots, T* y) {
  using A = Acc<T>;
  const int64_t S = p.states, tiles = (p.channels + kTile - 1) / kTile;
  const Widened<T> wide_B(p.B, p.num_sequences * S), wide_C(p.C, p.num_sequences * S);
  parallel_for(0, p.num_sequences * tiles, 4, [&](int64_t begin, int64_t end) HWY_ATTR {
    const hn::ScalableTag<A> d;
    const int64_t lanes = hn::Lanes(d);
    A sums[kTile] = {};
    Scan<T> in(p, /*rows=*/1);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tiles;
      const int64_t slot = slots == nullptr ? n : slots[n];
      in.first = task % tiles * kTile;
      in.width = std::min(kTile, p.channels - in.first);
      T* out = y + in.at(n);
      if (slot < 0) {
        std::fill(out, out + in.width, T{});
        continue;
      }
      in.load_chunk({n, n + 1});
      for_lanes<A>(in.width, [&](auto dc, int64_t i) HWY_ATTR {
        hn::StoreU(hn::Mul(in.skip(dc, i), hn::LoadU(dc, in.x.data() + i)), dc, sums + i);
      });
      const A *B = wide_B.data + n * S, *C = wide_C.data + n * S;
      for (int64_t c = 0; c < in.width; ++c) {
        A* h = pool + (slot * p.channels + in.first + c) * S;
        const A* rate = static_cast<const A*>(p.A) + (in.first + c) * S;
        const A dt = in.dt[c], dtx = dt * in.x[c];
        const auto update = [&](auto tag, int64_t s) HWY_ATTR {
          const auto e = exp_nonpositive(tag, hn::Mul(hn::Set(tag, dt), hn::LoadU(tag, rate + s)));
          const auto next = hn::MulAdd(transition<kSigned>(tag, e), hn::LoadU(tag, h + s),
                                       hn::Mul(hn::Set(tag, dtx), hn::LoadU(tag, B + s)));
          hn::StoreU(next, tag, h + s);
          return hn::Mul(next, hn::LoadU(tag, C + s));
        };
        auto sum = hn::Zero(d);
        int64_t s = 0;
        for (; s + lanes <= S; s += lanes) sum = hn::Add(sum, update(d, s));
        A rest = 0;
        for (; s < S; ++s) rest += hn::GetLane(update(hn::CappedTag<A, 1>(), s));
        sums[c] += hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
      }
      for (int64_t c = 0; c < in.width; ++c) store(out + c, sums[c]);
    }
  });
}

// f(zero of the storage type, whether the transition is signed).
template <class F>
void dispatch_scan(const SelectiveScanParams& p, const F& f) {
  dispatch_dtype(p.dtype, [&](auto t) {
    p.signed_transition ? f(t, std::true_type()) : f(t, std::false_type());
  });
}

void scan_forward_any(const SelectiveScanParams& p, void* y, void* final_state, void* saved) {
  dispatch_scan(p, [&](auto t, auto is_signed) {
    using T = decltype(t);
    forward<T, decltype(is_signed)::value>(p, static_cast<T*>(y), static_cast<Acc<T>*>(final_state),
                                           static_cast<Acc<T>*>(saved));
  });
}

void scan_backward_any(const SelectiveScanParams& p, const void* saved,
                       const SelectiveScanGrads& grads) {
  dispatch_scan(p, [&](auto t, auto is_signed) {
    using T = decltype(t);
    backward<T, decltype(is_signed)::value>(p, static_cast<const Acc<T>*>(saved), grads);
  });
}

void scan_step_any(const SelectiveScanParams& p, void* pool, const int64_t* slots, void* y) {
  dispatch_scan(p, [&](auto t, auto is_signed) {
    using T = decltype(t);
    step<T, decltype(is_signed)::value>(p, static_cast<Acc<T>*>(pool), slots, static_cast<T*>(y));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(scan_forward_any);
HWY_EXPORT(scan_backward_any);
HWY_EXPORT(scan_step_any);

namespace {

void check(const SelectiveScanParams& p) {
  GDN_CHECK(p.channels >= 1 && p.states >= 1,
            "[selective_scan] channels and states must be at least 1, got ", p.channels, " and ",
            p.states);
  GDN_CHECK(
      p.cu_seqlens != nullptr || p.num_sequences == 0 || p.total_tokens % p.num_sequences == 0,
      "[selective_scan] without cu_seqlens total_tokens must be a multiple of num_sequences, ",
      p.num_sequences, ", got ", p.total_tokens);
}

}  // namespace

int64_t selective_scan_chunks(const SelectiveScanParams& p) {
  check(p);
  return p.total_tokens / kScanChunk + p.num_sequences;
}

void selective_scan_forward(const SelectiveScanParams& p, void* y, void* final_state, void* saved) {
  check(p);
  HWY_DYNAMIC_DISPATCH(scan_forward_any)(p, y, final_state, saved);
}

void selective_scan_backward(const SelectiveScanParams& p, const void* saved,
                             const SelectiveScanGrads& grads) {
  check(p);
  HWY_DYNAMIC_DISPATCH(scan_backward_any)(p, saved, grads);
}

void selective_scan_step(const SelectiveScanParams& p, void* pool, int64_t num_slots,
                         const int64_t* slots, void* y) {
  check(p);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t slot = slots == nullptr ? n : slots[n];
    GDN_CHECK(slot < num_slots, "[selective_scan] a slot must be below the number of slots, ",
              num_slots, ", got ", slot);
  }
  HWY_DYNAMIC_DISPATCH(scan_step_any)(p, pool, slots, y);
}

}  // namespace gdn
#endif  // HWY_ONCE
