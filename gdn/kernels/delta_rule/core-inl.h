// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the chunk form share: one chunk of one head, its decays, scaled keys
// and scores. Formulas and names: README.md. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_CORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_CORE_INL_H_
#undef GDN_KERNELS_DELTA_RULE_CORE_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_CORE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "gdn/kernels/delta_rule/common.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd/gemm-inl.h"
#include "gdn/kernels/simd/rows-inl.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows of a sub-block in the scores of a channel gate; every chunk size is a multiple of it.
inline constexpr size_t kSub = 16;

// Rows i of y = x_i * table_i * s_i; the table holds one factor per row, or one per element
// (channel gate). Null table or s means 1.
template <typename T>
HWY_INLINE void scale_rows(size_t rows, size_t width, const T* x, const T* table, bool channel,
                           const T* s, T* y) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  for (size_t i = 0; i < rows; ++i) {
    T factor = s != nullptr ? s[i] : T(1);
    if (table != nullptr && !channel) factor *= table[i];
    const auto f = hn::Set(d, factor);
    if (table != nullptr && channel) {
      for (size_t j = i * width; j < (i + 1) * width; j += n) {
        hn::Store(hn::Mul(hn::Mul(hn::Load(d, x + j), hn::Load(d, table + j)), f), d, y + j);
      }
    } else {
      for (size_t j = i * width; j < (i + 1) * width; j += n) {
        hn::Store(hn::Mul(hn::Load(d, x + j), f), d, y + j);
      }
    }
  }
}

// y += x * table, elementwise on [width].
template <typename T>
HWY_INLINE void add_product(size_t width, const T* x, const T* table, T* y) {
  const Tag<T> d;
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    hn::Store(hn::MulAdd(hn::Load(d, x + j), hn::Load(d, table + j), hn::Load(d, y + j)), d, y + j);
  }
}

template <typename T>
HWY_INLINE void add_scaled(size_t width, const T* x, T s, T* y) {
  const Tag<T> d;
  const auto f = hn::Set(d, s);
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    hn::Store(hn::MulAdd(hn::Load(d, x + j), f, hn::Load(d, y + j)), d, y + j);
  }
}

template <typename T>
HWY_INLINE T dot(size_t width, const T* x, const T* y) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  auto even = hn::Zero(d), odd = hn::Zero(d);
  size_t j = 0;
  for (; j + 2 * n <= width; j += 2 * n) {
    even = hn::MulAdd(hn::Load(d, x + j), hn::Load(d, y + j), even);
    odd = hn::MulAdd(hn::Load(d, x + j + n), hn::Load(d, y + j + n), odd);
  }
  if (j < width) even = hn::MulAdd(hn::Load(d, x + j), hn::Load(d, y + j), even);
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
}

// Rows that the next chunk will load or store, brought to L2 a few lines at a time between the
// products of this chunk: they lie a page apart in memory, where no hardware prefetcher follows.
// Not to L1, which they would only clear, and not many at once, or the products wait for them.
class Prefetcher {
 public:
  void clear() { tensors_ = row_ = tensor_ = line_ = rows_ = 0; }
  // `width` elements of `size` bytes from `first` on, and again every `stride` elements: `rows`
  // rows.
  void add(const void* src, int64_t size, int64_t first, int64_t stride, int64_t width,
           int64_t rows) {
    if (src == nullptr || tensors_ == kMaxTensors) return;
    list_[tensors_++] = {static_cast<const char*>(src) + first * size, stride * size, width * size};
    rows_ = rows;
  }
  // Spreads what was added over `calls` calls of some_lines.
  void spread(size_t calls) {
    size_t lines = 0;
    for (size_t i = 0; i < tensors_; ++i) lines += rows_ * (list_[i].bytes + 63) / 64;
    burst_ = (lines + calls - 1) / std::max<size_t>(1, calls);
  }
  HWY_INLINE void some_lines() {
    for (size_t i = 0; i < burst_ && row_ < rows_; ++i) {
      const Rows& tensor = list_[tensor_];
      // To L2 (locality 2), for which Highway has no name.
      __builtin_prefetch(tensor.first + row_ * tensor.stride + line_, 0, 2);
      line_ += 64;
      if (line_ < tensor.bytes) continue;
      line_ = 0;
      if (++tensor_ < tensors_) continue;
      tensor_ = 0;
      ++row_;
    }
  }

 private:
  struct Rows {
    const char* first;
    int64_t stride, bytes;
  };
  static constexpr size_t kMaxTensors = 12;
  Rows list_[kMaxTensors];
  size_t tensors_ = 0, tensor_ = 0, burst_ = 1;  // how many; the next one; lines per call
  int64_t rows_ = 0, row_ = 0, line_ = 0;        // of each; the next row; the next byte of it
};

// Sizes after padding. Keys are padded to whole vectors and register tiles; values are cut into
// panels of panel_width columns, each [rows][PW] contiguous, so that a panel of the state (K x PW)
// stays in L1.
template <typename T>
struct Layout {
  explicit Layout(const DeltaRuleParams& x)
      : Layout(x, delta_rule::chunk_size(x), panel_width<T>(), std::max<size_t>(lanes<T>(), 8)) {}
  // With chunks of C tokens, panels of PW columns, and keys padded to multiples of `unit`.
  Layout(const DeltaRuleParams& x, size_t chunk, size_t panel, size_t unit)
      : C(chunk),
        K(x.K),
        V(x.V),
        PW(panel),
        panels((V + PW - 1) / PW),
        W(x.erase == DeltaErase::kSeparate ? 2 : 1),
        group(x.HV / x.H),
        channel(x.gate == DeltaGate::kChannel),
        old_state(x.erase == DeltaErase::kSeparate),
        first(x.erase == DeltaErase::kNone ? C : 0),
        Kp((K + unit - 1) / unit * unit) {}
  // For `count` columns of values only.
  void use_values(size_t count) {
    V = count;
    panels = (V + PW - 1) / PW;
  }
  size_t valid(size_t p) const { return std::min(PW, V - p * PW); }
  size_t columns(size_t p) const { return (valid(p) + lanes<T>() - 1) / lanes<T>() * lanes<T>(); }
  size_t state_size() const { return panels * Kp * PW; }
  size_t full_panels() const { return columns(panels - 1) == PW ? panels : panels - 1; }

  size_t C, K, V, PW, panels;
  size_t W;  // write keys per token: 1, or 2 (p then k) for a separate erase
  size_t group;
  bool channel;
  bool old_state;  // the erase reads the state before its decay
  size_t first;    // first row of bq in use: C where there is no erase
  size_t Kp;
};

// One chunk of n <= C tokens of one head. Rows past n are zero keys with no decay, so nothing has
// to know n.
template <typename T>
struct Core {
  static constexpr bool kPairs = false;

  Core(const DeltaRuleParams& params, Carver& carve) : Core(params, Layout<T>(params), carve) {}
  // Without `keys` there are tables, values and states only.
  Core(const DeltaRuleParams& params, const Layout<T>& layout, Carver& carve, bool keys = true)
      : x(params), L(layout) {
    const size_t C = L.C, Kp = L.Kp, W = L.W, table = L.channel ? Kp : 1;
    if (keys) {
      bq = carve.take<T>(2 * C * Kp);
      w = x.erase == DeltaErase::kKey ? bq : carve.take<T>(W * C * Kp);
      wT = carve.take<T>(W * C * Kp);
      bqE = carve.take<T>(2 * C * Kp);
      wEh = carve.take<T>(W * C * Kp);
    }
    Z = carve.take<T>(2 * C * W * C);
    e = carve.take<T>(C * table);
    E = carve.take<T>((C + 1) * table);
    Eh = carve.take<T>(C * table);
    D = carve.take<T>(C * C);
    f = carve.take<T>(2 * C);
    beta = carve.take<T>(C);
    if (x.channel_beta) betas = carve.take<T>(L.panels * C * L.PW);
    if (L.channel) {
      sub_bq = carve.take<T>(2 * kSub * Kp);
      sub_w = carve.take<T>(C * Kp);
      sub_wT = carve.take<T>(C * Kp);
    }
    q_norm = carve.take<T>(C);
    k_norm = carve.take<T>(C);
    run = carve.take<T>(Kp);
    row = carve.take<T>(L.panels * L.PW);
    out_row = carve.take<T>(L.panels * L.PW);
  }

  // From here on for `count` columns of values from `first` on, at most as many as at first.
  void use_values(int64_t first, int64_t count) {
    column = first;
    L.use_values(count);
  }

  void clear() {
    std::fill_n(Z, 2 * L.C * L.W * L.C, T(0));
    std::fill_n(D, L.C * L.C, T(0));
    std::fill_n(row, L.panels * L.PW, T(0));  // the padding past V stays zero
  }

  void load_rows(const void* src, int64_t t0, size_t n, int64_t heads, int64_t head, T* dst) const {
    for (size_t i = 0; i < n; ++i) {
      T* row = dst + i * L.Kp;
      load_row(x.dtype, src, ((t0 + i) * heads + head) * x.K, L.K, row);
      std::fill(row + L.K, row + L.Kp, T(0));
    }
    std::fill(dst + n * L.Kp, dst + L.C * L.Kp, T(0));
  }

  // Keys of head h for tokens [t0, t0 + n): what all value heads of a group share. Without
  // `readers` only those that write.
  void load_keys(int64_t t0, size_t n, int64_t h, bool readers = true) {
    const size_t half = L.C * L.Kp;
    if (readers) {
      load_rows(x.q, t0, n, x.H, h, bq + half);
      if (delta_rule::has_a(x.erase)) load_rows(x.a, t0, n, x.H, h, bq);
      if (x.l2norm_qk) normalize_rows(n, bq + half, q_norm);
    }
    if (x.erase == DeltaErase::kSeparate) load_rows(x.p, t0, n, x.H, h, w);
    load_rows(x.k, t0, n, x.H, h, key_rows());
    if (x.l2norm_qk) normalize_rows(n, key_rows(), k_norm);
  }
  T* key_rows() const { return w + (L.W - 1) * L.C * L.Kp; }
  // Divides rows by their lengths; `factors` takes one over these.
  void normalize_rows(size_t n, T* rows, T* factors) const {
    const Tag<T> d;
    std::fill_n(factors, L.C, T(0));
    for (size_t i = 0; i < n; ++i) factors[i] = dot(L.Kp, rows + i * L.Kp, rows + i * L.Kp);
    for (size_t i = 0; i < L.C; i += hn::Lanes(d)) {
      const auto squares = hn::Add(hn::Load(d, factors + i), hn::Set(d, T(delta_rule::kL2NormEps)));
      hn::Store(hn::Div(hn::Set(d, T(1)), hn::Sqrt(squares)), d, factors + i);
    }
    scale_rows<T>(n, L.Kp, rows, factors, false, nullptr, rows);
  }

  // Decay tables, beta per row, and the keys with their decays, for value head hv.
  void load_gate(int64_t t0, size_t n, int64_t hv) {
    const size_t C = L.C, Kp = L.Kp;
    const Tag<T> d;
    const T erase_sign = x.erase == DeltaErase::kSeparate ? T(1) : T(-1);
    const T* row_beta = x.channel_beta ? nullptr : static_cast<const T*>(x.beta);
    for (size_t i = 0; i < C; ++i) {
      beta[i] = row_beta != nullptr && i < n ? row_beta[(t0 + i) * x.HV + hv] : T(1);
      f[i] = erase_sign;
      f[C + i] = static_cast<T>(x.scale);
    }
    const size_t width = L.channel ? Kp : 1;
    const T* g = static_cast<const T*>(x.g);
    std::fill_n(e, C * width, T(0));
    if (L.channel) {
      for (size_t i = 0; i < n; ++i) {
        std::copy_n(g + ((t0 + i) * x.HV + hv) * x.K, L.K, e + i * Kp);
      }
    } else if (x.gate == DeltaGate::kScalar) {
      for (size_t i = 0; i < n; ++i) e[i] = g[(t0 + i) * x.HV + hv];
    }
    for (size_t i = 0; i < C * width; i += hn::Lanes(d)) {
      hn::Store(hn::Exp(d, hn::Load(d, e + i)), d, e + i);
    }
    // Products of factors <= 1 rather than exponentials of sums: nothing can overflow, and a token
    // that forgets all (g = -1e5) does not cost the tokens after it their digits.
    if (L.channel) {
      channel_tables();
    } else {
      scalar_tables();
    }
    for (size_t s = 0; s < L.W && w != nullptr; ++s) {
      scale_rows<T>(C, Kp, w + s * C * Kp, Eh, L.channel, nullptr, wEh + s * C * Kp);
    }
  }

  // Decays this small are taken as 0: what they would let through is lost in rounding, and numbers
  // below the normal range make some processors a hundred times slower.
  static constexpr T kTiny = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  static T flush_scalar(T x) { return x < kTiny ? T(0) : x; }
  static HWY_INLINE hn::Vec<Tag<T>> flush(hn::Vec<Tag<T>> x) {
    return hn::IfThenElseZero(hn::Ge(x, hn::Set(Tag<T>(), kTiny)), x);
  }

  void scalar_tables() {
    const size_t C = L.C;
    const Tag<T> d;
    T product = E[0] = T(1);
    for (size_t i = 0; i < C; ++i) E[i + 1] = product = flush_scalar(product * e[i]);
    product = Eh[C - 1] = T(1);
    for (size_t i = C - 1; i > 0; --i) Eh[i - 1] = product = flush_scalar(product * e[i]);
    D[0] = T(1);  // above the diagonal D stays as clear() left it
    for (size_t i = 1; i < C; ++i) {
      const auto factor = hn::Set(d, e[i]);
      for (size_t j = 0; j < C; j += hn::Lanes(d)) {
        hn::Store(flush(hn::Mul(factor, hn::Load(d, D + (i - 1) * C + j))), d, D + i * C + j);
      }
      D[i * C + i] = T(1);
    }
  }
  void channel_tables() {
    const size_t C = L.C, Kp = L.Kp;
    const Tag<T> d;
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      auto product = hn::Set(d, T(1));
      hn::Store(product, d, E + c);
      hn::Store(product, d, Eh + (C - 1) * Kp + c);
      for (size_t i = 0; i < C; ++i) {
        product = flush(hn::Mul(product, hn::Load(d, e + i * Kp + c)));
        hn::Store(product, d, E + (i + 1) * Kp + c);
      }
      product = hn::Set(d, T(1));
      for (size_t i = C - 1; i > 0; --i) {
        product = flush(hn::Mul(product, hn::Load(d, e + i * Kp + c)));
        hn::Store(product, d, Eh + (i - 1) * Kp + c);
      }
    }
  }

  // bqE_i = f_i E_i bq_i
  void decay_readers() {
    const size_t C = L.C, Kp = L.Kp;
    if (L.first == 0) scale_rows<T>(C, Kp, bq, erase_decay(), L.channel, f, bqE);
    scale_rows<T>(C, Kp, bq + C * Kp, query_decay(), L.channel, f + C, bqE + C * Kp);
  }

  // E of the rows that read: queries read after their token's decay, the erase of the separate form
  // before it.
  const T* query_decay() const { return E + (L.channel ? L.Kp : 1); }
  const T* erase_decay() const { return L.old_state ? E : query_decay(); }
  const T* end_decay() const { return E + L.C * (L.channel ? L.Kp : 1); }

  // Z[i][j] = f_i sum_d bq_id D_ijd w_jd, strictly lower in the erase's rows, lower in the
  // queries'.
  void scores() {
    const size_t C = L.C, Kp = L.Kp, ld = L.W * C;
    for (size_t s = 0; s < L.W; ++s) {
      const T* ws = w + s * C * Kp;
      if (L.channel) {
        for (size_t r = 0; r < C; r += kSub) channel_scores(r, ws, Z + s * C);
        continue;
      }
      transpose(C, Kp, ws, Kp, wT, C);
      for (size_t half = L.first; half < 2 * C; half += C) {
        for (size_t r = 0; r < C; r += kSub) {
          gemm<Into::kSet, false>(kSub, r + kSub, Kp, bq + (half + r) * Kp, Kp, wT, C,
                                  Z + (half + r) * ld + s * C, ld);
        }
      }
    }
    for (size_t i = L.first; i < 2 * C; ++i) apply_decay(i, f[i], Z + i * ld);
  }

  // Row i of Z or of its gradient: times the factor and the decays, and zero outside of the
  // triangle.
  void apply_decay(size_t i, T factor, T* row) const {
    const size_t C = L.C, count = i < C ? i : i - C + 1;
    if (count == 0) {
      std::fill_n(row, L.W * C, T(0));
      return;
    }
    const T* decay = D + (i >= C ? i - C : L.old_state ? i - 1 : i) * C;
    const Tag<T> d;
    const auto f = hn::Set(d, factor);
    for (size_t s = 0; s < L.W; ++s, row += C) {
      const size_t columns = (count + kSub - 1) / kSub * kSub;
      for (size_t j = 0; j < columns; j += hn::Lanes(d)) {
        auto value = hn::Mul(hn::Load(d, row + j), f);
        if (!L.channel) value = hn::Mul(value, hn::Load(d, decay + j));
        const auto keep = hn::FirstN(d, count > j ? count - j : 0);
        hn::Store(hn::IfThenElseZero(keep, value), d, row + j);
      }
      std::fill(row + columns, row + C, T(0));
    }
  }

  // Rows r..r+15 of both halves against write keys 0..r+15. Left of the diagonal block the decay
  // factors at r: (e_r .. e_i) times (e_j+1 .. e_r-1). Inside it the second factor is one over
  // (e_r .. e_j); where that would be large, the products are carried along directly.
  void channel_scores(size_t r, const T* ws, T* out) {
    const size_t C = L.C, Kp = L.Kp, ld = L.W * C;
    decay_sub_block(r, bq, ws);
    const bool factors = divide_sub_block(r, ws);
    const size_t n = factors ? r + kSub : r;
    if (n > 0) {
      transpose(n, Kp, sub_w, Kp, sub_wT, C);
      if (L.first == 0) {
        gemm<Into::kSet, false>(kSub, n, Kp, sub_bq, Kp, sub_wT, C, out + r * ld, ld);
      }
      gemm<Into::kSet, false>(kSub, n, Kp, sub_bq + kSub * Kp, Kp, sub_wT, C, out + (C + r) * ld,
                              ld);
    }
    if (!factors) diagonal_scores(r, ws, out);
  }
  void diagonal_scores(size_t r, const T* ws, T* out) {
    const size_t C = L.C, Kp = L.Kp, ld = L.W * C;
    const Tag<T> d;
    for (size_t j = r; j < r + kSub; ++j) {
      std::copy_n(ws + j * Kp, Kp, run);
      out[(C + j) * ld + j] = dot(Kp, run, bq + (C + j) * Kp);
      for (size_t i = j + 1; i < r + kSub; ++i) {
        auto erase = hn::Zero(d), query = hn::Zero(d);
        for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
          const auto before = hn::Load(d, run + c);
          const auto after = hn::Mul(before, hn::Load(d, e + i * Kp + c));
          hn::Store(after, d, run + c);
          if (L.first == 0) {
            erase = hn::MulAdd(L.old_state ? before : after, hn::Load(d, bq + i * Kp + c), erase);
          }
          query = hn::MulAdd(after, hn::Load(d, bq + (C + i) * Kp + c), query);
        }
        if (L.first == 0) out[i * ld + j] = hn::GetLane(hn::SumOfLanes(d, erase));
        out[(C + i) * ld + j] = hn::GetLane(hn::SumOfLanes(d, query));
      }
    }
  }

  // sub_bq = (rows r.. of bq) times their decay since r; sub_w = (write keys before r) times their
  // decay up to r.
  void decay_sub_block(size_t r, const T* rows, const T* ws) {
    const size_t C = L.C, Kp = L.Kp;
    const Tag<T> d;
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      auto decay = hn::Set(d, T(1));
      for (size_t i = 0; i < kSub; ++i) {
        const auto before = decay;
        decay = hn::Mul(decay, hn::Load(d, e + (r + i) * Kp + c));
        if (L.first == 0) {
          const auto b = hn::Load(d, rows + (r + i) * Kp + c);
          hn::Store(hn::Mul(b, L.old_state ? before : decay), d, sub_bq + i * Kp + c);
        }
        const auto q = hn::Load(d, bq + (C + r + i) * Kp + c);
        hn::Store(hn::Mul(q, decay), d, sub_bq + (kSub + i) * Kp + c);
      }
      decay = hn::Set(d, T(1));
      for (size_t j = r; j-- > 0;) {
        hn::Store(hn::Mul(hn::Load(d, ws + j * Kp + c), decay), d, sub_w + j * Kp + c);
        decay = hn::Mul(decay, hn::Load(d, e + j * Kp + c));
      }
    }
  }

  // sub_w = (write keys from r on) over their decay since r. False where that is so small that its
  // inverse, times what lies above the diagonal, could overflow.
  bool divide_sub_block(size_t r, const T* ws) const {
    const size_t Kp = L.Kp;
    const Tag<T> d;
    constexpr T kLeast = T(1e-12);
    auto least = hn::Set(d, T(1));
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      auto decay = hn::Load(d, e + r * Kp + c);
      for (size_t i = r + 1; i < r + kSub; ++i) decay = hn::Mul(decay, hn::Load(d, e + i * Kp + c));
      least = hn::Min(least, decay);
      auto inverse = hn::Div(hn::Set(d, T(1)), hn::Max(decay, hn::Set(d, kLeast)));
      for (size_t i = r + kSub; i-- > r;) {
        hn::Store(hn::Mul(hn::Load(d, ws + i * Kp + c), inverse), d, sub_w + i * Kp + c);
        inverse = hn::Mul(inverse, hn::Load(d, e + i * Kp + c));
      }
    }
    return hn::AllTrue(d, hn::Ge(least, hn::Set(d, kLeast)));
  }

  // Rows [0, n) of values into panels, zero below: row i of panel p goes to dst + p * stride + i *
  // PW. Whole rows at a time, because tokens lie HV * V elements apart in memory.
  void load_values(DType dtype, const void* src, int64_t t0, size_t n, int64_t hv, T* dst,
                   size_t stride) const {
    const Tag<T> d;
    // Whole panels come from where they lie, the rest by way of a padded row.
    const size_t direct = dtype == kDTypeOf<T> ? L.V / L.PW : 0, rest = direct * L.PW;
    for (size_t i = 0; i < n; ++i) {
      const int64_t at = ((t0 + i) * x.HV + hv) * x.V + column;
      for (size_t p = 0; p < direct; ++p) {
        const T* from = static_cast<const T*>(src) + at + p * L.PW;
        for (size_t j = 0; j < L.PW; j += hn::Lanes(d)) {
          hn::Store(hn::LoadU(d, from + j), d, dst + p * stride + i * L.PW + j);
        }
      }
      if (direct == L.panels) continue;
      load_row(dtype, src, at + rest, L.V - rest, row + rest);
      for (size_t p = direct; p < L.panels; ++p) {
        for (size_t j = 0; j < L.columns(p); j += hn::Lanes(d)) {
          hn::Store(hn::Load(d, row + p * L.PW + j), d, dst + p * stride + i * L.PW + j);
        }
      }
    }
    for (size_t p = 0; p < L.panels; ++p) {
      std::fill(dst + p * stride + n * L.PW, dst + p * stride + L.C * L.PW, T(0));
    }
  }
  void store_values(DType dtype, void* dst, int64_t t0, size_t n, int64_t hv, const T* src,
                    size_t stride) const {
    const Tag<T> d;
    const size_t direct = dtype == kDTypeOf<T> ? L.V / L.PW : 0, rest = direct * L.PW;
    for (size_t i = 0; i < n; ++i) {
      const int64_t at = ((t0 + i) * x.HV + hv) * x.V + column;
      for (size_t p = 0; p < direct; ++p) {
        T* to = static_cast<T*>(dst) + at + p * L.PW;
        for (size_t j = 0; j < L.PW; j += hn::Lanes(d)) {
          hn::StoreU(hn::Load(d, src + p * stride + i * L.PW + j), d, to + j);
        }
      }
      if (direct == L.panels) continue;
      for (size_t p = direct; p < L.panels; ++p) {
        for (size_t j = 0; j < L.columns(p); j += hn::Lanes(d)) {
          hn::Store(hn::Load(d, src + p * stride + i * L.PW + j), d, out_row + p * L.PW + j);
        }
      }
      store_row(dtype, dst, at + rest, L.V - rest, out_row + rest);
    }
  }

  void load_betas(int64_t t0, size_t n, int64_t hv) const {
    if (x.channel_beta) {
      load_values(kDTypeOf<T>, x.beta, t0, n, hv, betas, L.C * L.PW);
    }
  }
  // Calls f with the factors beta of panel p.
  template <class F>
  HWY_INLINE void with_beta(size_t p, F&& f) const {
    if (x.channel_beta) {
      f(ElementFactors<T>{betas + p * L.C * L.PW, L.PW});
    } else {
      f(RowFactors<T>{beta});
    }
  }
  // y = beta * values, one panel.
  void times_beta(size_t p, const T* values, T* y) const {
    const Tag<T> d;
    with_beta(p, [&](auto factors) HWY_ATTR {
      for (size_t i = 0; i < L.C; ++i) {
        for (size_t j = 0; j < L.columns(p); j += hn::Lanes(d)) {
          const size_t at = i * L.PW + j;
          hn::Store(hn::Mul(factors.at(i, j), hn::Load(d, values + at)), d, y + at);
        }
      }
    });
  }

  // States: [K][V] outside, panels inside. Row after row, as they lie outside.
  void load_state(const T* src, T* state) const {
    if (src == nullptr || L.Kp > L.K || L.valid(L.panels - 1) < L.PW) {
      std::fill_n(state, L.state_size(), T(0));
    }
    for (size_t i = 0; i < L.K && src != nullptr; ++i) {
      for (size_t p = 0; p < L.panels; ++p) {
        copy_row(src + i * x.V + column + p * L.PW, L.valid(p), state + (p * L.Kp + i) * L.PW);
      }
    }
  }
  void store_state(const T* state, T* dst) const {
    for (size_t i = 0; i < L.K; ++i) {
      for (size_t p = 0; p < L.panels; ++p) {
        copy_row(state + (p * L.Kp + i) * L.PW, L.valid(p), dst + i * x.V + column + p * L.PW);
      }
    }
  }

  // Products of rows with reader i and write key i.
  T dot_reader(size_t i, const T* y) const { return dot(L.Kp, bq + i * L.Kp, y); }
  T dot_writer(size_t i, const T* y) const { return dot(L.Kp, w + i * L.Kp, y); }
  void add_writer_product(size_t i, const T* y, T* sum) const {
    add_product(L.Kp, w + i * L.Kp, y, sum);
  }
  // From the gradients of n normalised queries or keys to those of the rows themselves.
  void query_norm_grads(size_t n, T* dy) const { norm_grads(n, bq + L.C * L.Kp, q_norm, dy); }
  void key_norm_grads(size_t n, T* dy) const { norm_grads(n, key_rows(), k_norm, dy); }
  void norm_grads(size_t count, const T* y, const T* factors, T* dy) const {
    for (size_t i = 0; i < count; ++i) {
      T* g = dy + i * L.Kp;
      add_scaled(L.Kp, y + i * L.Kp, -dot(L.Kp, y + i * L.Kp, g), g);
      scale_rows<T>(1, L.Kp, g, nullptr, false, factors + i, g);
    }
  }

  // Announces rows [t0, t0 + n) of a key tensor or of a value tensor (dtype) to the prefetcher.
  void expect_keys(const void* src, int64_t t0, size_t n, int64_t h) {
    ahead.add(src, size_of(x.dtype), (t0 * x.H + h) * x.K, x.H * x.K, x.K, n);
  }
  void expect_values(DType dtype, const void* src, int64_t t0, size_t n, int64_t hv) {
    ahead.add(src, size_of(dtype), (t0 * x.HV + hv) * x.V + column, x.HV * x.V, L.V, n);
  }

  // next = E_n * state + (w Eh)^T values, one panel; next may be state.
  void advance_state(size_t p, const T* values, const T* state, T* next) {
    gemm<true>(FromScaledRows<T>{state, L.PW, end_decay(), L.channel ? size_t{1} : 0}, L.Kp,
               L.columns(p), {kSub, L.W * L.C / kSub, kSub * L.Kp, kSub * L.PW}, wEh, L.Kp, values,
               L.PW, next, L.PW, [this]() HWY_ATTR { ahead.some_lines(); });
  }

  const DeltaRuleParams& x;
  Layout<T> L;
  int64_t column = 0;  // the first one of the values in use
  Prefetcher ahead;
  T* bq = nullptr;                   // [2C][Kp] erase keys, then queries
  T *w = nullptr, *wT = nullptr;     // [W][C][Kp] write keys (merged with a = k: the erase keys),
                                     // [Kp][C] one of them transposed
  T *bqE = nullptr, *wEh = nullptr;  // the same with decays from the chunk's start, to its end; bqE
                                     // with the factors f
  T* Z;                              // [2C][W C] scores
  T *e, *E, *Eh;  // decay of each token; product up to token i in row i+1; product after token i
  T* D;           // [C][C] product over j+1..i, scalar gate only
  T *f, *beta;    // [2C] row factors: -1 or (separate) +1 for the erase, scale for queries; [C]
  T* betas = nullptr;  // [panels][C][PW] beta per value channel
  T *sub_bq = nullptr, *sub_w = nullptr, *sub_wT = nullptr;  // channel gate: see decay_sub_block
  T *q_norm, *k_norm;                                        // [C] one over the length of q and k
  T* run;                                                    // [Kp]
  T *row, *out_row;  // [panels PW] one row of values on its way in or out
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
