// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/short_conv.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/short_conv.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/rows.h"
#include "gdn/kernels/simd-inl.h"

#ifndef GDN_SHORT_CONV_ONCE  // what does not depend on the SIMD target
#define GDN_SHORT_CONV_ONCE
namespace gdn::short_conv {

// Channels per task: a few cache lines of each of a tile's rows, so that reading down the rows
// stays sequential enough.
inline constexpr int64_t kChunk = 256;

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Span sequence(const ShortConvParams& p, int64_t n) {
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  const int64_t length = p.total_tokens / p.num_sequences;
  return {n * length, (n + 1) * length};
}

// A piece of a sequence that is worked on at once.
struct Tile {
  int64_t n;
  Span seq, tokens;
};

inline std::vector<Tile> make_tiles(const ShortConvParams& p, int64_t length) {
  std::vector<Tile> tiles;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const Span seq = sequence(p, n);
    for (int64_t t = seq.begin; t < seq.end; t += length) {
      tiles.push_back({n, seq, {t, std::min(seq.end, t + length)}});
    }
  }
  return tiles;
}

inline int64_t row_stride(const ShortConvParams& p) {
  return p.x_stride == 0 ? p.channels : p.x_stride;
}

// [N, C, W] of T to [N, W, C] of its accumulation type, so that channels lie side by side; empty
// for null.
template <typename T>
std::vector<Acc<T>> channels_last(const T* in, int64_t n, int64_t channels, int width) {
  if (in == nullptr) return {};
  std::vector<Acc<T>> out(n * channels * width);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int j = 0; j < width; ++j) {
        out[(i * width + j) * channels + c] = load(in + (i * channels + c) * width + j);
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

using short_conv::Span;
using short_conv::Tile;

// One task's view of the operands. kW is the width, or 0 for a width known at run time only.
template <typename T, int kW>
struct Operands {
  using A = Acc<T>;
  const ShortConvParams& p;
  const A* weight;   // [W, C]
  const A* bias;     // [C] or null
  const A* history;  // [N, W, C] or null
  int width() const { return kW == 0 ? p.width : kW; }

  // The input at `pos`, which may lie up to W-1 tokens before the sequence.
  template <class D>
  HWY_INLINE hn::Vec<D> input(D d, const Tile& tile, int64_t pos, int64_t c) const {
    if (pos >= tile.seq.begin) {
      return load_as(d, static_cast<const T*>(p.x) + pos * short_conv::row_stride(p) + c);
    }
    if (history == nullptr) return hn::Zero(d);
    const int64_t column = width() + pos - tile.seq.begin;
    return hn::LoadU(d, history + (tile.n * width() + column) * p.channels + c);
  }

  // Fills w with the weights, x[0 .. W-2] with the inputs before the tile, and x[W-1] with zeros.
  template <class D, class V>
  HWY_INLINE void start(D d, const Tile& tile, int64_t c, V* w, V* x) const {
    for (int j = 0; j < width(); ++j) w[j] = hn::LoadU(d, weight + j * p.channels + c);
    for (int j = 0; j + 1 < width(); ++j) {
      x[j] = input(d, tile, tile.tokens.begin - (width() - 1) + j, c);
    }
    x[width() - 1] = hn::Zero(d);
  }

  template <class D>
  HWY_INLINE hn::Vec<D> bias_at(D d, int64_t c) const {
    return bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + c);
  }

  template <class V>
  HWY_INLINE V convolve(V sum, const V* w, const V* x) const {
    for (int j = 0; j < width(); ++j) sum = hn::MulAdd(w[j], x[j], sum);
    return sum;
  }

  template <class V>
  HWY_INLINE void shift(V* window) const {
    for (int j = 0; j + 1 < width(); ++j) window[j] = window[j + 1];
  }
};

template <typename T, int kW>
void forward(const ShortConvParams& p, T* y) {
  using A = Acc<T>;
  const std::vector<A> weight =
      short_conv::channels_last(static_cast<const A*>(p.weight), 1, p.channels, p.width);
  const std::vector<A> history = short_conv::channels_last(static_cast<const T*>(p.initial),
                                                           p.num_sequences, p.channels, p.width);
  const Operands<T, kW> in{p, weight.data(), static_cast<const A*>(p.bias),
                           p.initial ? history.data() : nullptr};
  const std::vector<Tile> tiles = short_conv::make_tiles(p, 16);
  const int64_t chunks = (p.channels + short_conv::kChunk - 1) / short_conv::kChunk;
  parallel_for(0, tiles.size() * chunks, 4, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const Tile& tile = tiles[task / chunks];
      const int64_t first = task % chunks * short_conv::kChunk;
      for_lanes<A>(std::min(short_conv::kChunk, p.channels - first),
                   [&](auto d, int64_t i) HWY_ATTR {
                     const int64_t c = first + i;
                     hn::Vec<decltype(d)> w[kMaxConvWidth], x[kMaxConvWidth];
                     in.start(d, tile, c, w, x);
                     const auto bias = in.bias_at(d, c);
                     for (int64_t t = tile.tokens.begin; t < tile.tokens.end; ++t) {
                       x[in.width() - 1] = in.input(d, tile, t, c);
                       auto v = in.convolve(bias, w, x);
                       if (p.silu) v = hn::Mul(v, sigmoid(d, v));
                       store_as(d, v, y + t * p.channels + c);
                       in.shift(x);
                     }
                   });
    }
  });
}

// e = dy * act'(pre-activation);  dx[s] = sum_j w[j] e[s + W-1 - j];  dweight[j] = sum_t e[t] x[t -
// (W-1) + j].
template <typename T, int kW>
void backward(const ShortConvParams& p, const ShortConvGrads& g) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  const std::vector<A> weight =
      short_conv::channels_last(static_cast<const A*>(p.weight), 1, channels, p.width);
  const std::vector<A> history = short_conv::channels_last(static_cast<const T*>(p.initial),
                                                           p.num_sequences, channels, p.width);
  const std::vector<A> d_final = short_conv::channels_last(static_cast<const T*>(g.d_final),
                                                           p.num_sequences, channels, p.width);
  const Operands<T, kW> in{p, weight.data(), static_cast<const A*>(p.bias),
                           p.initial ? history.data() : nullptr};
  const T* dy = static_cast<const T*>(g.dy);
  T* dx = static_cast<T*>(g.dx);
  const std::vector<Tile> tiles = short_conv::make_tiles(p, 32);
  const RowBlocks groups(tiles.size(), 1, 16);
  const int64_t chunks = (channels + short_conv::kChunk - 1) / short_conv::kChunk;
  const int64_t sums = (p.width + 1) * channels;  // of dweight [W, C], then of dbias [C]
  std::vector<A> partial(groups.count() * sums);
  std::vector<A> d_history(g.d_initial == nullptr ? 0 : p.num_sequences * p.width * channels);
  parallel_for(0, groups.count() * chunks, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / chunks, first = task % chunks * short_conv::kChunk;
      A* sum = partial.data() + group * sums;
      for (int64_t k = groups.begin(group); k < groups.end(group); ++k) {
        const Tile& tile = tiles[k];
        for_lanes<A>(
            std::min(short_conv::kChunk, channels - first), [&](auto d, int64_t i) HWY_ATTR {
              const int64_t c = first + i;
              const int width = in.width();
              hn::Vec<decltype(d)> w[kMaxConvWidth], x[kMaxConvWidth], e[kMaxConvWidth],
                  dw[kMaxConvWidth];
              in.start(d, tile, c, w, x);
              const auto bias = in.bias_at(d, c);
              for (int j = 0; j < width; ++j) {
                e[j] = hn::Zero(d);
                dw[j] = hn::LoadU(d, sum + j * channels + c);
              }
              auto db = hn::LoadU(d, sum + width * channels + c);
              // dx of the tile's last tokens needs e of up to W-1 tokens after the tile, which are
              // computed again there.
              for (int64_t t = tile.tokens.begin; t < tile.tokens.end + width - 1; ++t) {
                auto now = hn::Zero(d);
                if (t < tile.seq.end) {
                  x[width - 1] = in.input(d, tile, t, c);
                  if (dy != nullptr) now = load_as(d, dy + t * channels + c);
                  if (p.silu) {
                    const auto pre = in.convolve(bias, w, x);
                    const auto s = sigmoid(d, pre);
                    const auto one = hn::Set(d, 1);
                    now = hn::Mul(now, hn::Mul(s, hn::MulAdd(pre, hn::Sub(one, s), one)));
                  }
                }
                if (t < tile.tokens.end) {
                  for (int j = 0; j < width; ++j) dw[j] = hn::MulAdd(now, x[j], dw[j]);
                  db = hn::Add(db, now);
                }
                e[width - 1] = now;
                const int64_t s = t - (width - 1);
                auto v = hn::Zero(d);
                for (int j = 0; j < width; ++j) v = hn::MulAdd(w[j], e[width - 1 - j], v);
                if (s >= tile.tokens.begin) {
                  if (!d_final.empty() && s >= tile.seq.end - width) {
                    const int64_t column = s - (tile.seq.end - width);
                    v = hn::Add(
                        v, hn::LoadU(d, d_final.data() + (tile.n * width + column) * channels + c));
                  }
                  store_as(d, v, dx + s * channels + c);
                } else if (!d_history.empty() && s < tile.seq.begin) {
                  const int64_t column = width + s - tile.seq.begin;
                  if (tile.tokens.begin == tile.seq.begin) {
                    hn::StoreU(v, d, d_history.data() + (tile.n * width + column) * channels + c);
                  }
                }
                in.shift(x);
                in.shift(e);
              }
              for (int j = 0; j < width; ++j) hn::StoreU(dw[j], d, sum + j * channels + c);
              hn::StoreU(db, d, sum + width * channels + c);
            });
      }
    }
  });
  A* dweight = static_cast<A*>(g.dweight);
  A* dbias = static_cast<A*>(g.dbias);
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j <= p.width; ++j) {
      A total = 0;
      for (int64_t group = 0; group < groups.count(); ++group)
        total += partial[group * sums + j * channels + c];
      if (j < p.width) {
        dweight[c * p.width + j] = total;
      } else if (dbias != nullptr) {
        dbias[c] = total;
      }
    }
  }
  if (g.d_initial == nullptr) return;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t length = short_conv::sequence(p, n).size();
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
  if constexpr (std::is_same_v<T, BFloat16>) {
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
      if (p.silu) v = hn::Mul(v, sigmoid(d, v));
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
    if (p.silu) v = hn::Mul(v, sigmoid(d1, v));
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

// Calls f with the width as a constant where it is a usual one, so that windows stay in registers,
// else with 0.
template <class F>
void dispatch_width(int width, const F& f) {
  switch (width) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

void short_conv_forward_any(const ShortConvParams& p, void* y) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_width(p.width, [&](auto w) { forward<T, w.value>(p, static_cast<T*>(y)); });
  });
}

void short_conv_backward_any(const ShortConvParams& p, const ShortConvGrads& grads) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_width(p.width, [&](auto w) { backward<T, w.value>(p, grads); });
  });
}

void short_conv_step_any(const ShortConvParams& p, void* pool, const int64_t* slots, void* y) {
  dispatch_dtype(p.dtype, [&](auto t) {
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

using short_conv::sequence;
using short_conv::Span;

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
    const Span seq = sequence(p, n);
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
  const Span seq = sequence(p, n);
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
    const Span seq = sequence(p, n);
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
    const Span seq = sequence(p, n);
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
