// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/short_conv.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/short_conv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/rows.h"
#include "gdn/kernels/sequences.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

#ifndef GDN_SHORT_CONV_ONCE  // what does not depend on the SIMD target
#define GDN_SHORT_CONV_ONCE
namespace gdn::short_conv {

// Tokens that a pass over the channels takes at once, so that weights are loaded and inputs are
// converted for several of them; and channels per task, whose sums stay in L1.
inline constexpr int kForwardRows = 8, kBackwardRows = 4;
inline constexpr int64_t kChunk = 512;

// Tokens of one sequence.
struct Run {
  int64_t n;
  TokenSpan seq, tokens;
};

// Each sequence cut into pieces of at most `length`.
inline std::vector<Run> make_tiles(const ShortConvParams& p, int64_t length) {
  int64_t count = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) count += chunks_of(sequence_span(p, n), length);
  std::vector<Run> tiles;
  tiles.reserve(count);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const TokenSpan seq = sequence_span(p, n);
    for (int64_t t = seq.begin; t < seq.end; t += length) {
      tiles.push_back({n, seq, {t, std::min(seq.end, t + length)}});
    }
  }
  return tiles;
}

// What of each sequence lies in [tokens.begin, tokens.end).
inline void find_runs(const ShortConvParams& p, TokenSpan tokens, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const TokenSpan seq = sequence_span(p, n);
    const TokenSpan part = {std::max(seq.begin, tokens.begin), std::min(seq.end, tokens.end)};
    if (part.size() > 0) runs.push_back({n, seq, part});
  }
}

inline int64_t row_stride(const ShortConvParams& p) {
  return p.x_stride == 0 ? p.channels : p.x_stride;
}

// [N, C, W] to [N, W, C], so that channels lie side by side; empty for null. Out: T or Acc<T>.
template <typename Out, typename T>
PageVector<Out> channels_last(const T* in, int64_t n, int64_t channels, int width) {
  if (in == nullptr) return {};
  PageVector<Out> out(n * channels * width);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int j = 0; j < width; ++j) {
        const T& value = in[(i * channels + c) * width + j];
        Out& to = out[(i * width + j) * channels + c];
        if constexpr (std::is_same_v<Out, T>) {
          to = value;
        } else {
          to = load(&value);
        }
      }
    }
  }
  return out;
}

}  // namespace gdn::short_conv
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

using short_conv::kBackwardRows;
using short_conv::kChunk;
using short_conv::kForwardRows;
using short_conv::Run;

// The operands of a call. kW is the width, or 0 for a width known at run time only.
template <typename T, int kW>
struct Operands {
  using A = Acc<T>;

  explicit Operands(const ShortConvParams& params)
      : p(params),
        bias(static_cast<const A*>(params.bias)),
        weights(short_conv::channels_last<A>(static_cast<const A*>(params.weight), 1,
                                             params.channels, params.width)),
        history(short_conv::channels_last<T>(static_cast<const T*>(params.initial),
                                             params.num_sequences, params.channels, params.width)),
        zeros(params.channels, T{}) {
    for (int j = 0; j < width(); ++j) {
      A* row = weights.data() + j * p.channels;
      for_bundles<T>(0, p.channels, [&](auto bundle, int64_t c) HWY_ATTR {
        bundle.store_own(bundle.load(row + c), row + c);
      });
    }
  }

  int width() const { return kW == 0 ? p.width : kW; }

  // The row of inputs at `pos`, which may lie up to W-1 tokens before the sequence.
  const T* row(const Run& run, int64_t pos) const {
    if (pos >= run.seq.begin) return static_cast<const T*>(p.x) + pos * short_conv::row_stride(p);
    if (history.empty()) return zeros.data();
    return history.data() + (run.n * width() + width() + pos - run.seq.begin) * p.channels;
  }
  // Those that `count` tokens from t on convolve: [W-1 + count].
  void rows(const Run& run, int64_t t, int64_t count, const T** out) const {
    for (int64_t i = 0; i < width() - 1 + count; ++i) out[i] = row(run, t - (width() - 1) + i);
  }

  // Row j of the weights for vector m of the bundle of channels from c on.
  template <class Bundle>
  HWY_INLINE auto weights_at(Bundle bundle, int j, int64_t c, int m) const {
    return hn::LoadU(bundle.d, weights.data() + j * p.channels + c + m * hn::Lanes(bundle.d));
  }
  template <class Bundle>
  HWY_INLINE typename Bundle::Vectors bias_at(Bundle bundle, int64_t c) const {
    return bias == nullptr ? bundle.zero() : bundle.load(bias + c);
  }
  template <class V>
  HWY_INLINE V convolve(V sum, const V* w, const V* x) const {
    for (int j = 0; j < width(); ++j) sum = hn::MulAdd(w[j], x[j], sum);
    return sum;
  }
  const ShortConvParams& p;
  const A* bias;                // [C] or null
  PageVector<A> weights;        // [W, C], rows in the order of T's bundles
  const PageVector<T> history;  // [N, W, C] or empty
  const PageVector<T> zeros;    // [C]
};

// kCount tokens from t on, for channels [first, last). All inputs of a bundle of channels are
// loaded before its results are stored: rows are often a multiple of 4 KiB apart, and then a load
// waits for an earlier store to another row, because the lower bits of their addresses are the
// same.
template <int kCount, typename T, int kW>
void forward_tokens(const Operands<T, kW>& in, const Output& to, const Run& run, int64_t t,
                    int64_t first, int64_t last, T* y) {
  const ShortConvParams& p = in.p;
  const T* rows[kMaxConvWidth + kCount];
  in.rows(run, t, kCount, rows);
  const auto make = [&](auto bundle, int64_t c) GDN_INLINE_ATTR {
    const int width = in.width();  // a constant, which a captured one would not be
    const auto d = bundle.d;
    const auto bias = in.bias_at(bundle, c);
    std::array<typename decltype(bundle)::Vectors, kCount> out;
    HWY_UNROLL(16)
    for (int m = 0; m < bundle.kCount; ++m) {
      hn::Vec<decltype(bundle.d)> w[kMaxConvWidth], x[kMaxConvWidth + kCount];
      for (int j = 0; j < width; ++j) w[j] = in.weights_at(bundle, j, c, m);
      for (int r = 0; r < width - 1 + kCount; ++r) x[r] = bundle.load_part(rows[r] + c, m);
      HWY_UNROLL(16)
      for (int r = 0; r < kCount; ++r) out[r][m] = in.convolve(bias[m], w, x + r);
      if (p.silu) {
        HWY_UNROLL(16)
        for (int r = 0; r < kCount; ++r) out[r][m] = silu<kPrecisionOf<T>>(d, out[r][m]);
      }
    }
    return out;
  };
  const auto store = [&](auto bundle, int64_t c, const auto& out) GDN_INLINE_ATTR {
    HWY_UNROLL(16)
    for (int r = 0; r < kCount; ++r) bundle.store(to, out[r], y + (t + r) * p.channels + c);
  };
  map_bundles<T, WholeBundle<T>::kCount == 1>(first, last, make, store);
}

template <typename T, int kW>
void forward(const ShortConvParams& p, T* y) {
  const Operands<T, kW> in(p);
  const int64_t row_bytes = p.channels * static_cast<int64_t>(sizeof(T));
  const Output to(2 * p.total_tokens * row_bytes, y, row_bytes);
  const std::vector<Run> tiles = short_conv::make_tiles(p, kForwardRows);
  const int64_t chunks = (p.channels + kChunk - 1) / kChunk;
  parallel_for(0, tiles.size() * chunks, 4, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const Run& tile = tiles[task / chunks];
      const int64_t first = task % chunks * kChunk, last = std::min(first + kChunk, p.channels);
      int64_t t = tile.tokens.begin;
      for (; t + kForwardRows <= tile.tokens.end; t += kForwardRows) {
        forward_tokens<kForwardRows>(in, to, tile, t, first, last, y);
      }
      for (; t < tile.tokens.end; ++t) forward_tokens<1>(in, to, tile, t, first, last, y);
    }
    to.finish();
  });
}

// What tokens add: all that follows from them; what the inputs before them get only, because the
// next run sums the rest; nothing, because they lie behind the sequence.
enum class Add : uint8_t { kAll, kInputs, kNothing };

// Some channels of a group of tokens, a few tokens at a time:
//   e = dy * act'(pre-activation);  dx[s] = sum_j w[j] e[s + W-1 - j];
//   dweight[j] = sum_t e[t] x[t - (W-1) + j]
// What a vector of channels carries from token to token lies side by side in `carried`: W weights,
// W sums of dweight, that of dbias, and the last W-1 of e. As rows of all channels, which are often
// a multiple of 4 KiB long, these lines would push each other and those of the tokens out of L1.
template <typename T, int kW>
struct BackwardGroup {
  using A = Acc<T>;

  BackwardGroup(const Operands<T, kW>& in, const ShortConvGrads& g, const A* d_final, A* d_history)
      : in(in),
        g(g),
        d_final(d_final),
        d_history(d_history),
        to(3 * in.p.total_tokens * in.p.channels * static_cast<int64_t>(sizeof(T)), g.dx,
           in.p.channels * static_cast<int64_t>(sizeof(T))),
        carried(3 * in.p.width * kChunk) {}

  // Channels [first, last) of the runs; writes their sums to rows of all channels [W+1, C].
  void run(const std::vector<Run>& runs, int64_t first_channel, int64_t last_channel, A* sums) {
    first = first_channel;
    last = last_channel;
    const int width = in.width();
    for_each_bundle([&](auto bundle, int64_t c, A* own) HWY_ATTR {
      const int64_t n = bundle.size();
      for (int j = 0; j < width; ++j) {
        for (int m = 0; m < bundle.kCount; ++m) {
          const int64_t at = m * static_cast<int64_t>(hn::Lanes(bundle.d));
          hn::StoreU(in.weights_at(bundle, j, c, m), bundle.d, own + j * n + at);
        }
      }
      for (int j = width; j <= 2 * width; ++j) bundle.store_own(bundle.zero(), own + j * n);
    });
    for (const Run& each : runs) {
      tokens = each;
      for_each_bundle([&](auto bundle, int64_t, A* own) HWY_ATTR {
        for (int j = 2 * width + 1; j < 3 * width; ++j) {
          bundle.store_own(bundle.zero(), own + j * bundle.size());
        }
      });
      const auto [begin, end] = tokens.tokens;
      add<Add::kAll>(begin, end);
      // The last tokens' dx needs e of up to W-1 more.
      const int64_t needed = end + width - 1, there = std::min(needed, tokens.seq.end);
      add<Add::kInputs>(end, there);
      add<Add::kNothing>(there, needed);
    }
    for_each_bundle([&](auto bundle, int64_t c, A* own) HWY_ATTR {
      for (int j = 0; j <= width; ++j) {
        bundle.store(Output(), bundle.load_own(own + (width + j) * bundle.size()),
                     sums + j * in.p.channels + c);
      }
    });
    to.finish();
  }

 private:
  // Calls f(bundle, channel, what the bundle carries).
  template <class F>
  HWY_INLINE void for_each_bundle(const F& f) {
    for_bundles<T>(first, last, [&](auto bundle, int64_t c) HWY_ATTR {
      f(bundle, c, carried.data() + (c - first) * 3 * in.width());
    });
  }

  template <Add kAdd>
  void add(int64_t t, int64_t end) {
    if constexpr (kAdd == Add::kAll) {
      for (; t + kBackwardRows <= end; t += kBackwardRows) step<kAdd, kBackwardRows>(t);
    }
    for (; t < end; ++t) step<kAdd, 1>(t);
  }

  template <Add kAdd, int kCount>
  void step(int64_t t) {
    const ShortConvParams& p = in.p;
    const int64_t channels = p.channels;
    const int width = in.width();
    const T *rows[kMaxConvWidth + kCount], *dy[kCount];
    T* dx[kCount];
    A* before[kCount];            // d_history's row instead of dx's
    const A* from_final[kCount];  // what d_final adds to it
    if constexpr (kAdd != Add::kNothing) in.rows(tokens, t, kCount, rows);
    for (int64_t r = 0; r < kCount; ++r) {
      dy[r] = g.dy == nullptr ? in.zeros.data() : static_cast<const T*>(g.dy) + (t + r) * channels;
      const int64_t s = t + r - (width - 1), column = s - (tokens.seq.end - width);
      const bool own = s >= tokens.tokens.begin, starts = tokens.tokens.begin == tokens.seq.begin;
      dx[r] = own ? static_cast<T*>(g.dx) + s * channels : nullptr;
      before[r] = !own && starts && d_history != nullptr
                      ? d_history + (tokens.n * width + width + s - tokens.seq.begin) * channels
                      : nullptr;
      from_final[r] = own && column >= 0 && d_final != nullptr
                          ? d_final + (tokens.n * width + column) * channels
                          : nullptr;
    }
    for_each_bundle([&](auto bundle, int64_t c, A* carried_here) HWY_ATTR {
      const int width = in.width();  // a constant, which a captured one would not be
      const auto d = bundle.d;
      using V = hn::Vec<decltype(bundle.d)>;
      const int64_t n = bundle.size();
      const auto bias = in.bias_at(bundle, c);
      typename decltype(bundle)::Vectors out[kCount];
      if constexpr (kAdd != Add::kNothing) {
        HWY_UNROLL(16)
        for (int r = 0; r < kCount; ++r) {  // what the next step reads, to L2
          __builtin_prefetch(rows[width - 1 + r] + kCount * short_conv::row_stride(p) + c, 0, 2);
          __builtin_prefetch(dy[r] + kCount * channels + c, 0, 2);
        }
      }
      HWY_UNROLL(16)
      for (int m = 0; m < bundle.kCount; ++m) {  // one vector's weights and window fit registers
        V w[kMaxConvWidth], x[kMaxConvWidth + kCount], e[kMaxConvWidth + kCount];
        A* own = carried_here + m * static_cast<int64_t>(hn::Lanes(d));
        A *dweight = own + width * n, *before_e = own + (2 * width + 1) * n;
        for (int j = 0; j < width; ++j) w[j] = hn::LoadU(d, own + j * n);
        for (int j = 0; j + 1 < width; ++j) e[j] = hn::LoadU(d, before_e + j * n);
        auto* now = e + (width - 1);
        if constexpr (kAdd == Add::kNothing) {
          HWY_UNROLL(16)
          for (int r = 0; r < kCount; ++r) now[r] = hn::Zero(d);
        } else {
          for (int64_t r = 0; r < width - 1 + kCount; ++r) x[r] = bundle.load_part(rows[r] + c, m);
          HWY_UNROLL(16)
          for (int r = 0; r < kCount; ++r) now[r] = bundle.load_part(dy[r] + c, m);
          if (p.silu) {
            HWY_UNROLL(16)
            for (int r = 0; r < kCount; ++r) {
              const V pre = in.convolve(bias[m], w, x + r);
              now[r] = hn::Mul(now[r], silu_and_slope(d, pre).slope);
            }
          }
        }
        if constexpr (kAdd == Add::kAll) {
          for (int j = 0; j < width; ++j) {
            auto dw = hn::LoadU(d, dweight + j * n);
            HWY_UNROLL(16)
            for (int r = 0; r < kCount; ++r) dw = hn::MulAdd(now[r], x[r + j], dw);
            hn::StoreU(dw, d, dweight + j * n);
          }
          auto db = hn::LoadU(d, dweight + width * n);
          HWY_UNROLL(16)
          for (int r = 0; r < kCount; ++r) db = hn::Add(db, now[r]);
          hn::StoreU(db, d, dweight + width * n);
        }
        HWY_UNROLL(16)
        for (int r = 0; r < kCount; ++r) {
          auto v = hn::Mul(w[0], now[r]);
          for (int j = 1; j < width; ++j) v = hn::MulAdd(w[j], e[r + width - 1 - j], v);
          out[r][m] = v;
        }
        for (int j = 0; j + 1 < width; ++j) hn::StoreU(e[kCount + j], d, before_e + j * n);
      }
      HWY_UNROLL(16)
      for (int r = 0; r < kCount; ++r) {
        if (dx[r] != nullptr) {
          if (from_final[r] != nullptr) {
            const auto more = bundle.load(from_final[r] + c);
            for (int m = 0; m < bundle.kCount; ++m) out[r][m] = hn::Add(out[r][m], more[m]);
          }
          bundle.store(to, out[r], dx[r] + c);
        } else if (before[r] != nullptr) {
          bundle.store(Output(), out[r], before[r] + c);
        }
      }
    });
  }

  const Operands<T, kW>& in;
  const ShortConvGrads& g;
  const A* d_final;  // [N, W, C] or null
  A* d_history;      // [N, W, C] or null
  const Output to;   // dx
  PageVector<A> carried;
  Run tokens = {};
  int64_t first = 0, last = 0;  // channels
};

template <typename T, int kW>
void backward(const ShortConvParams& p, const ShortConvGrads& g) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  const Operands<T, kW> in(p);
  const PageVector<A> d_final = short_conv::channels_last<A>(static_cast<const T*>(g.d_final),
                                                             p.num_sequences, channels, p.width);
  const RowBlocks groups(p.total_tokens, 64, 16);
  const int64_t chunks = (channels + kChunk - 1) / kChunk;
  const int64_t num_sums = (p.width + 1) * channels;  // of dweight [W, C], then of dbias [C]
  PageVector<A> partial(groups.count() * num_sums);
  PageVector<A> d_history(g.d_initial == nullptr ? 0 : p.num_sequences * p.width * channels);
  parallel_for(0, groups.count() * chunks, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    BackwardGroup<T, kW> worker(in, g, d_final.empty() ? nullptr : d_final.data(),
                                d_history.empty() ? nullptr : d_history.data());
    std::vector<Run> runs;
    runs.reserve(p.num_sequences);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / chunks, first = task % chunks * kChunk;
      short_conv::find_runs(p, {groups.begin(group), groups.end(group)}, runs);
      worker.run(runs, first, std::min(first + kChunk, channels),
                 partial.data() + group * num_sums);
    }
  });
  A* dweight = static_cast<A*>(g.dweight);
  A* dbias = static_cast<A*>(g.dbias);
  add_rows_up(partial.data(), groups.count(), num_sums);
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < p.width; ++j) dweight[c * p.width + j] = partial[j * channels + c];
  }
  if (dbias != nullptr) {
    std::copy_n(partial.data() + p.width * channels, channels, dbias);
  }
  if (g.d_initial == nullptr) return;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t length = sequence_span(p, n).size();
    for (int64_t c = 0; c < channels; ++c) {
      for (int j = 0; j < p.width; ++j) {
        A v = d_history[(n * p.width + j) * channels + c];
        // A sequence shorter than W leaves a part of its history in the final one.
        if (!d_final.empty() && j >= length)
          v += d_final[(n * p.width + j - length) * channels + c];
        store(static_cast<T*>(g.d_initial) + (n * channels + c) * p.width + j, v);
      }
    }
  }
}

// Lanes that move between histories without conversion.
template <typename T>
using Raw = std::conditional_t<std::is_floating_point_v<T>, T, uint16_t>;

template <typename T, class D, class V>
HWY_INLINE hn::Vec<D> widen(D d, V raw) {
  if constexpr (std::is_base_of_v<BFloat16, T>) {
    return widen_bf16(d, raw);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), raw));
  } else {
    return raw;
  }
}

template <typename T>
void step_channels(const ShortConvParams& p, const T* x, T* history, T* y, int64_t begin,
                   int64_t end) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  int64_t c = begin;
  if (p.width == 4) {
    const hn::ScalableTag<A> d;
    const hn::Rebind<Raw<T>, decltype(d)> raw;
    const int64_t lanes = hn::Lanes(d);
    for (; c + lanes <= end; c += lanes) {
      Raw<T>* h = reinterpret_cast<Raw<T>*>(history) + c * 4;
      hn::Vec<decltype(raw)> oldest, x0, x1, x2;
      hn::LoadInterleaved4(raw, h, oldest, x0, x1, x2);
      const auto x3 = hn::LoadU(raw, reinterpret_cast<const Raw<T>*>(x) + c);
      hn::StoreInterleaved4(x0, x1, x2, x3, raw, h);
      hn::Vec<decltype(d)> w0, w1, w2, w3;
      hn::LoadInterleaved4(d, weight + c * 4, w0, w1, w2, w3);
      auto v = bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + c);
      v = hn::MulAdd(w0, widen<T>(d, x0), v);
      v = hn::MulAdd(w1, widen<T>(d, x1), v);
      v = hn::MulAdd(w2, widen<T>(d, x2), v);
      v = hn::MulAdd(w3, widen<T>(d, x3), v);
      if (p.silu) v = silu<kPrecisionOf<T>>(d, v);
      store_as(d, v, y + c);
    }
  }
  const hn::CappedTag<A, 1> d1;
  for (; c < end; ++c) {
    T* h = history + c * p.width;
    for (int j = 0; j + 1 < p.width; ++j) h[j] = h[j + 1];
    h[p.width - 1] = x[c];
    auto v = bias == nullptr ? hn::Zero(d1) : hn::LoadU(d1, bias + c);
    for (int j = 0; j < p.width; ++j)
      v = hn::MulAdd(hn::LoadU(d1, weight + c * p.width + j), load_as(d1, h + j), v);
    if (p.silu) v = silu<kPrecisionOf<T>>(d1, v);
    store_as(d1, v, y + c);
  }
}

template <typename T>
void step(const ShortConvParams& p, T* pool, const int64_t* slots, T* y) {
  const int64_t chunk = 1024, chunks = (p.channels + chunk - 1) / chunk;
  parallel_for(0, p.num_sequences * chunks, 2, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / chunks, first = task % chunks * chunk,
                    last = std::min(first + chunk, p.channels);
      const int64_t slot = slots == nullptr ? n : slots[n];
      T* out = y + n * p.channels;
      if (slot < 0) {
        std::fill(out + first, out + last, T{});
        continue;
      }
      step_channels(p, static_cast<const T*>(p.x) + n * short_conv::row_stride(p),
                    pool + slot * p.channels * p.width, out, first, last);
    }
  });
}

// Calls f with the width as a constant where it is the usual one, so that windows stay in
// registers, else with 0.
template <class F>
void dispatch_width(int width, const F& f) {
  width == 4 ? f(std::integral_constant<int, 4>()) : f(std::integral_constant<int, 0>());
}

void short_conv_forward_any(const ShortConvParams& p, void* y) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_width(p.width, [&](auto w) { forward<T, w.value>(p, static_cast<T*>(y)); });
  });
}

void short_conv_backward_any(const ShortConvParams& p, const ShortConvGrads& grads) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_width(p.width, [&](auto w) { backward<T, w.value>(p, grads); });
  });
}

void short_conv_step_any(const ShortConvParams& p, void* pool, const int64_t* slots, void* y) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    step<T>(p, static_cast<T*>(pool), slots, static_cast<T*>(y));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(short_conv_forward_any);
HWY_EXPORT(short_conv_backward_any);
HWY_EXPORT(short_conv_step_any);

namespace {

void check(const ShortConvParams& p) {
  GDN_CHECK(p.width >= 1 && p.width <= kMaxConvWidth, "[short_conv] width must be 1 to ",
            kMaxConvWidth, ", got ", p.width);
  GDN_CHECK(p.channels >= 1, "[short_conv] channels must be at least 1, got ", p.channels);
  GDN_CHECK(p.x_stride == 0 || p.x_stride >= p.channels,
            "[short_conv] x_stride must be 0 or at least channels, ", p.channels, ", got ",
            p.x_stride);
}

void check_sequences(const ShortConvParams& p) {
  check(p);
  GDN_CHECK(p.num_sequences >= 1 || p.total_tokens == 0,
            "[short_conv] there must be a sequence for the ", p.total_tokens, " tokens");
  GDN_CHECK(
      p.cu_seqlens != nullptr || p.num_sequences == 0 || p.total_tokens % p.num_sequences == 0,
      "[short_conv] total_tokens must be a multiple of num_sequences, ", p.num_sequences, ", got ",
      p.total_tokens);
}

template <typename T>
void copy_final_history(const ShortConvParams& p, T* out) {
  const int64_t width = p.width;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const TokenSpan seq = sequence_span(p, n);
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t pos = seq.end - width + j, row = (n * p.channels + c) * width;
        T value{};
        if (pos >= seq.begin) {
          value = static_cast<const T*>(p.x)[pos * short_conv::row_stride(p) + c];
        } else if (p.initial != nullptr) {
          value = static_cast<const T*>(p.initial)[row + j + seq.size()];
        }
        out[row + j] = value;
      }
    }
  }
}

double at(DType dtype, const void* data, int64_t i) {
  return dispatch_dtype(
      dtype, [&](auto t) -> double { return load(static_cast<const decltype(t)*>(data) + i); });
}

DType acc_of(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// The input of sequence n at `pos`, which may lie up to W tokens before it.
double naive_input(const ShortConvParams& p, int64_t n, int64_t pos, int64_t c) {
  const TokenSpan seq = sequence_span(p, n);
  if (pos >= seq.begin) return at(p.dtype, p.x, pos * short_conv::row_stride(p) + c);
  if (p.initial == nullptr) return 0;
  return at(p.dtype, p.initial, (n * p.channels + c) * p.width + p.width + pos - seq.begin);
}

double naive_weight(const ShortConvParams& p, int64_t c, int j) {
  return at(acc_of(p.dtype), p.weight, c * p.width + j);
}

double naive_convolution(const ShortConvParams& p, int64_t n, int64_t t, int64_t c) {
  double sum = p.bias == nullptr ? 0 : at(acc_of(p.dtype), p.bias, c);
  for (int j = 0; j < p.width; ++j)
    sum += naive_weight(p, c, j) * naive_input(p, n, t - (p.width - 1) + j, c);
  return sum;
}

}  // namespace

void short_conv_forward(const ShortConvParams& p, void* y, void* final_history) {
  check_sequences(p);
  HWY_DYNAMIC_DISPATCH(short_conv_forward_any)(p, y);
  if (final_history == nullptr) return;
  dispatch_dtype(p.dtype,
                 [&](auto t) { copy_final_history(p, static_cast<decltype(t)*>(final_history)); });
}

void short_conv_backward(const ShortConvParams& p, const ShortConvGrads& grads) {
  check_sequences(p);
  HWY_DYNAMIC_DISPATCH(short_conv_backward_any)(p, grads);
}

void short_conv_step(const ShortConvParams& p, void* pool, int64_t num_slots, const int64_t* slots,
                     void* y) {
  check(p);
  GDN_CHECK(slots != nullptr || p.num_sequences <= num_slots, "[short_conv_step] ", p.num_sequences,
            " sequences without slots need as many slots, got ", num_slots);
  for (int64_t n = 0; slots != nullptr && n < p.num_sequences; ++n) {
    GDN_CHECK(slots[n] < num_slots, "[short_conv_step] slots must be below ", num_slots, ", got ",
              slots[n]);
  }
  HWY_DYNAMIC_DISPATCH(short_conv_step_any)(p, pool, slots, y);
}

void short_conv_naive_forward(const ShortConvParams& p, double* y, double* final_history) {
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const TokenSpan seq = sequence_span(p, n);
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t t = seq.begin; t < seq.end; ++t) {
        const double v = naive_convolution(p, n, t, c);
        y[t * p.channels + c] = p.silu ? v / (1 + std::exp(-v)) : v;
      }
      for (int j = 0; final_history != nullptr && j < p.width; ++j) {
        final_history[(n * p.channels + c) * p.width + j] =
            naive_input(p, n, seq.end - p.width + j, c);
      }
    }
  }
}

void short_conv_naive_backward(const ShortConvParams& p, const double* dy, const double* d_final,
                               double* dx, double* dweight, double* dbias, double* d_initial) {
  std::fill(dx, dx + p.total_tokens * p.channels, 0.0);
  std::fill(dweight, dweight + p.channels * p.width, 0.0);
  if (dbias != nullptr) std::fill(dbias, dbias + p.channels, 0.0);
  if (d_initial != nullptr)
    std::fill(d_initial, d_initial + p.num_sequences * p.channels * p.width, 0.0);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const TokenSpan seq = sequence_span(p, n);
    for (int64_t c = 0; c < p.channels; ++c) {
      auto add = [&](int64_t pos, double v) {  // to the gradient of naive_input(p, n, pos, c)
        if (pos >= seq.begin) {
          dx[pos * p.channels + c] += v;
        } else if (d_initial != nullptr) {
          d_initial[(n * p.channels + c) * p.width + p.width + pos - seq.begin] += v;
        }
      };
      for (int64_t t = seq.begin; dy != nullptr && t < seq.end; ++t) {
        double e = dy[t * p.channels + c];
        if (p.silu) {
          const double v = naive_convolution(p, n, t, c), s = 1 / (1 + std::exp(-v));
          e *= s * (1 + v * (1 - s));
        }
        if (dbias != nullptr) dbias[c] += e;
        for (int j = 0; j < p.width; ++j) {
          const int64_t pos = t - (p.width - 1) + j;
          dweight[c * p.width + j] += e * naive_input(p, n, pos, c);
          add(pos, e * naive_weight(p, c, j));
        }
      }
      for (int j = 0; d_final != nullptr && j < p.width; ++j) {
        add(seq.end - p.width + j, d_final[(n * p.channels + c) * p.width + j]);
      }
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
