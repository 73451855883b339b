// SPDX-License-Identifier: Apache-2.0
// One chunk of one head: the coefficients of its tokens, the key pass, the read pass and the new
// weights. Names follow README.md. Token matrices lie transposed, [channels][NP] with the tokens in
// the lanes, so that per-token factors are vector operations and no product needs a transposed
// weight matrix. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_TEST_TIME_MEMORY_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_TEST_TIME_MEMORY_CHUNK_INL_H_
#undef GDN_KERNELS_TEST_TIME_MEMORY_CHUNK_INL_H_
#else
#define GDN_KERNELS_TEST_TIME_MEMORY_CHUNK_INL_H_
#endif

#include <algorithm>
#include <vector>

#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"
#include "gdn/kernels/simd/gemm-inl.h"
#include "gdn/kernels/simd/rows-inl.h"
#include "gdn/kernels/test_time_memory/common.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// For triangular solves without factors.
template <typename T>
struct UnitFactors {
  HWY_INLINE hn::Vec<Tag<T>> at(size_t, size_t) const { return hn::Set(Tag<T>(), T(1)); }
};

// dst[cols, rows] = src[rows, cols]^T for any sizes.
template <typename T>
HWY_INLINE void transpose_any(size_t rows, size_t cols, const T* src, size_t ld_src, T* dst,
                              size_t ld_dst) {
  const size_t r4 = rows / 4 * 4, c4 = cols / 4 * 4;
  transpose(r4, c4, src, ld_src, dst, ld_dst);
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = i < r4 ? c4 : 0; j < cols; ++j) dst[j * ld_dst + i] = src[i * ld_src + j];
  }
}

// The activation between layers with its first two derivatives.
template <class D, class V>
HWY_INLINE void activate(D d, MemoryActivation kind, V z, V& f, V& f1, V& f2) {
  const V one = hn::Set(d, 1), two = hn::Set(d, 2);
  if (kind == MemoryActivation::kSilu) {
    const V r = sigmoid(d, z), r1 = hn::Mul(r, hn::Sub(one, r));
    f = hn::Mul(z, r);
    f1 = hn::MulAdd(z, r1, r);
    f2 = hn::Mul(r1, hn::MulAdd(z, hn::NegMulAdd(two, r, one), two));
    return;
  }
  const V a = hn::Set(d, 0.79788456080286535588), b = hn::Set(d, 0.044715);
  const V half = hn::Set(d, 0.5), zz = hn::Mul(z, z);
  const V y = hn::Mul(a, hn::Mul(z, hn::MulAdd(b, zz, one)));
  const V y1 = hn::Mul(a, hn::MulAdd(hn::Mul(hn::Set(d, 3), b), zz, one));
  const V y2 = hn::Mul(a, hn::Mul(hn::Mul(hn::Set(d, 6), b), z));
  const V t = hn::Sub(hn::Mul(two, sigmoid(d, hn::Mul(two, y))), one);  // tanh(y)
  const V s = hn::NegMulAdd(t, t, one), sy = hn::Mul(s, y1);
  const V gate = hn::Mul(half, hn::Add(one, t));
  f = hn::Mul(z, gate);
  f1 = hn::MulAdd(hn::Mul(half, z), sy, gate);
  const V curve = hn::MulSub(s, y2, hn::Mul(hn::Mul(two, t), hn::Mul(sy, y1)));
  f2 = hn::MulAdd(hn::Mul(half, z), curve, sy);
}

// What a product starts from: a x, plus b y and c z where they are given; one layout for all.
template <typename T>
struct FromSum {
  T a;
  const T* x;
  T b;
  const T* y;
  T c;
  const T* z;
  size_t ld;
  HWY_INLINE FromSum tile(size_t i, size_t j) const {
    const size_t at = i * ld + j;
    return {a, x + at, b, y != nullptr ? y + at : y, c, z != nullptr ? z + at : z, ld};
  }
  template <size_t kRows, size_t kVectors>
  HWY_INLINE void start(hn::Vec<Tag<T>> (&sum)[kRows][kVectors]) const {
    const Tag<T> d;
    for (size_t i = 0; i < kRows; ++i) {
      for (size_t j = 0; j < kVectors; ++j) {
        const size_t at = i * ld + j * hn::Lanes(d);
        sum[i][j] = hn::Mul(hn::Set(d, a), hn::Load(d, x + at));
        if (y != nullptr) sum[i][j] = hn::MulAdd(hn::Set(d, b), hn::Load(d, y + at), sum[i][j]);
        if (z != nullptr) sum[i][j] = hn::MulAdd(hn::Set(d, c), hn::Load(d, z + at), sum[i][j]);
      }
    }
  }
};

// C[m,NP] = from + op(A) B for token matrices B and C. One vector of tokens leaves registers for
// tiles twice as high: a line of the weights A is then read once, and each row of B half as often.
template <bool kTransA, typename T, class From>
HWY_INLINE void token_gemm(From from, size_t m, size_t NP, size_t k, const T* a, size_t lda,
                           const T* b, T* c) {
  constexpr size_t kRows = 2 * kTileRows;
  const size_t step = kTransA ? 1 : lda;
  size_t i = 0;
  if (NP == lanes<T>()) {
    for (; i + kRows <= m; i += kRows) {
      gemm_tile<kRows, 1, kTransA>(from.tile(i, 0), {k}, a + i * step, lda, b, NP, c + i * NP, NP);
    }
  }
  if (i < m) {
    gemm<kTransA>(from.tile(i, 0), m - i, NP, {k}, a + i * step, lda, b, NP, c + i * NP, NP);
  }
}

// Shapes of a head's network and of the buffers; layers 1..depth have index 0..depth-1.
template <typename T>
struct MemoryShape {
  explicit MemoryShape(const MemoryParams& p)
      : L(p.depth), D(p.D), C(test_time_memory::tile(p)), bias(p.bias ? 1 : 0) {
    const size_t unit = std::max(lanes<T>(), kTileRows);
    NP = (C + unit - 1) / unit * unit;
    for (size_t l = 0; l < L; ++l) {
      in.push_back(l == 0 ? D : p.hidden);
      out.push_back(l + 1 == L ? D : p.hidden);
      rows.push_back(in[l] + bias);
      ld.push_back((out[l] + lanes<T>() - 1) / lanes<T>() * lanes<T>());
      at.push_back(padded);
      flat_at.push_back(flat);
      padded += rows[l] * ld[l];
      flat += rows[l] * out[l];
      widest = std::max({widest, rows[l], ld[l]});
    }
  }

  // Weights from and to the flat layout of tensors.
  void load(const T* src, T* dst) const {
    for (size_t l = 0; l < L; ++l) {
      for (size_t i = 0; i < rows[l]; ++i) {
        T* row = dst + at[l] + i * ld[l];
        std::copy_n(src + flat_at[l] + i * out[l], out[l], row);
        std::fill(row + out[l], row + ld[l], T(0));
      }
    }
  }
  void store(const T* src, T* dst) const {
    for (size_t l = 0; l < L; ++l) {
      for (size_t i = 0; i < rows[l]; ++i)
        std::copy_n(src + at[l] + i * ld[l], out[l], dst + flat_at[l] + i * out[l]);
    }
  }

  size_t L, D, C, NP, bias, padded = 0, flat = 0, widest = 0;
  std::vector<size_t> in, out, rows, ld, at, flat_at;
};

// y = a x + b y over [size]; whole vectors.
template <typename T>
HWY_INLINE void combine(size_t size, T a, const T* HWY_RESTRICT x, T b, T* HWY_RESTRICT y) {
  const Tag<T> d;
  const auto va = hn::Set(d, a), vb = hn::Set(d, b);
  for (size_t i = 0; i < size; i += hn::Lanes(d))
    hn::Store(hn::MulAdd(va, hn::Load(d, x + i), hn::Mul(vb, hn::Load(d, y + i))), d, y + i);
}

template <typename T>
HWY_INLINE void scale(size_t size, T a, T* y) {
  if (a == T(1)) return;
  const Tag<T> d;
  for (size_t i = 0; i < size; i += hn::Lanes(d))
    hn::Store(hn::Mul(hn::Set(d, a), hn::Load(d, y + i)), d, y + i);
}

template <typename T>
HWY_INLINE T dot_all(size_t size, const T* x, const T* y) {
  return sum_lanes<T>(size, [&](auto d, int64_t i) HWY_ATTR {
    return hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, y + i));
  });
}

// For rows of [rows][NP] buffers: f(d, i, j) for each vector at i, over the tokens from j on.
template <typename T, class F>
HWY_INLINE void for_tokens(size_t rows, size_t NP, F&& f) {
  const Tag<T> d;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < NP; j += hn::Lanes(d)) f(d, i * NP + j, j);
  }
}

// y[i,t] = s[t] x[i,t].
template <typename T>
HWY_INLINE void scale_tokens(size_t rows, size_t NP, const T* s, const T* x, T* y) {
  for_tokens<T>(rows, NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
    hn::Store(hn::Mul(hn::Load(d, s + j), hn::Load(d, x + i)), d, y + i);
  });
}

// sum[t] += sign * sum_i x[i,t] y[i,t].
template <typename T>
HWY_INLINE void dot_tokens(size_t rows, size_t NP, const T* x, const T* y, T sign, T* sum) {
  const Tag<T> d;
  for (size_t j = 0; j < NP; j += hn::Lanes(d)) {
    auto s = hn::Zero(d);
    for (size_t i = j; i < rows * NP; i += NP)
      s = hn::MulAdd(hn::Load(d, x + i), hn::Load(d, y + i), s);
    hn::Store(hn::MulAdd(hn::Set(d, sign), s, hn::Load(d, sum + j)), d, sum + j);
  }
}

// What a chunk of n tokens, whose first is number `position` of its sequence, does with M and S.
struct ChunkKind {
  int64_t n = 0;
  bool use_s = false;     // reads add cc S
  bool write_m = false;   // M changes at the end
  bool write_s = false;   // S changes at the end
  bool fresh = false;     // gradients are taken at M
  bool complete = false;  // the next chunk is fresh
};

inline ChunkKind chunk_kind(const MemoryParams& p, int64_t n, int64_t position, bool has_s) {
  ChunkKind kind;
  kind.n = n;
  const int64_t at = p.sequential ? 0 : position % p.chunk;
  kind.fresh = at == 0;
  kind.complete = p.sequential || at + n == p.chunk;
  if (p.rule == MemoryRule::kTtt) {
    kind.use_s = has_s && at > 0;
    kind.write_m = kind.complete;
    kind.write_s = !kind.complete;
  } else {
    kind.use_s = kind.write_s = p.eta != nullptr;
    kind.write_m = true;
  }
  return kind;
}

// Section "Coefficients" of README.md. Matrices are [NP][NP]; row t, column j.
template <typename T>
struct Coefficients {
  void take(Carver& arena, size_t NP_) {
    NP = NP_;
    for (T** m : {&H, &m_to, &om_t}) *m = arena.take<T>(NP * NP);
    for (T** v :
         {&rate, &eta, &keep, &tau, &beta, &cc, &m0, &read_beta, &read_cc, &read_rest, &lam, &kap})
      *v = arena.take<T>(NP);
  }

  // The rows t of this chunk's tokens: the tokens `first` and following of p, head h.
  void load(const MemoryParams& p, const ChunkKind& kind, int64_t first, int64_t h,
            int64_t position) {
    n = kind.n;
    auto row = [&](const void* src, int64_t t) {
      return static_cast<const T*>(src)[(first + t) * p.H + h];
    };
    for (size_t t = 0; t < NP; ++t) {
      const bool real = static_cast<int64_t>(t) < n;
      rate[t] = real ? row(p.rate, t) : T(0);
      eta[t] = real && p.eta != nullptr ? row(p.eta, t) : T(0);
      keep[t] = real && p.alpha != nullptr ? T(1) - row(p.alpha, t) : T(1);
      lam[t] = kap[t] = T(0);
    }
    std::fill_n(om_t, NP * NP, T(0));
    std::fill_n(read_beta, NP, T(1));
    std::fill_n(read_cc, NP, T(0));
    p.rule == MemoryRule::kTtt ? ttt(p, position) : lmm(p);
    for (size_t t = 0; t < NP; ++t) read_rest[t] = T(1) - read_beta[t];
  }

  void ttt(const MemoryParams& p, int64_t position) {
    for (int64_t t = 0; t < n; ++t) {
      tau[t] = static_cast<const T*>(p.tau)[(position + t) % p.chunk];
      read_cc[t] = -tau[t];
      for (int64_t j = 0; j <= t; ++j) om_t[j * NP + t] = tau[t] * rate[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      lam[j] = tau[n - 1] * rate[j];
      kap[j] = -rate[j];
    }
    beta_n = 1;
    c_n = -tau[n - 1];
    m_n = 1;
  }

  void lmm(const MemoryParams& p) {
    T b = 1, c = 0, m = 1;
    for (int64_t t = 0; t < n; ++t) {
      b *= keep[t];
      m *= eta[t];
      c = keep[t] * c + m;
      beta[t] = b;
      cc[t] = c;
      m0[t] = m;
      T* h_row = H + t * NP;
      T* m_row = m_to + t * NP;
      for (int64_t j = 0; j < t; ++j) {
        m_row[j] = eta[t] * m_row[j - static_cast<int64_t>(NP)];
        h_row[j] = keep[t] * h_row[j - static_cast<int64_t>(NP)] + m_row[j];
      }
      m_row[t] = h_row[t] = 1;
    }
    beta_n = beta[n - 1];
    c_n = cc[n - 1];
    m_n = m0[n - 1];
    for (int64_t j = 0; j < n; ++j) {
      lam[j] = H[(n - 1) * NP + j] * rate[j];
      kap[j] = m_to[(n - 1) * NP + j] * rate[j];
    }
    for (int64_t t = p.read_before ? 1 : 0; t < n; ++t) {
      const int64_t s = p.read_before ? t - 1 : t;  // the memory after token s is read
      read_beta[t] = beta[s];
      read_cc[t] = cc[s];
      for (int64_t j = 0; j <= s; ++j) om_t[j * NP + t] = H[s * NP + j] * rate[j];
    }
  }

  size_t NP = 0;
  int64_t n = 0;
  T *H, *m_to;  // kLmm: weight of token j's update in M_t and in S_t, without its rate
  T* om_t;      // weight of token j's gradient in what t reads, [j][t]
  T *rate, *eta, *keep, *tau;
  T *beta, *cc, *m0;  // kLmm: weights of M and S of the call's start in M_t, of S in S_t
  // Weights of M, S and the anchor in what t reads.
  T *read_beta, *read_cc, *read_rest;
  T *lam, *kap;  // weights of the gradients in the new M and S
  T beta_n = 1, c_n = 0, m_n = 1;
};

// The token matrices that the key pass leaves: layers' inputs X, the gradients D at their outputs.
template <typename T>
struct KeyPass {
  void take(Carver& arena, const MemoryShape<T>& s, bool clip) {
    for (size_t l = 0; l < s.L; ++l) {
      X.push_back(arena.take<T>(s.rows[l] * s.NP));
      Z.push_back(arena.take<T>(s.out[l] * s.NP));
      F.push_back(l + 1 < s.L ? arena.take<T>(s.out[l] * s.NP) : nullptr);
      G.push_back(l + 1 < s.L ? arena.take<T>(s.out[l] * s.NP) : nullptr);
      Du.push_back(arena.take<T>(s.out[l] * s.NP));
      Du_rows.push_back(arena.take<T>(s.NP * s.ld[l]));
      D.push_back(clip ? arena.take<T>(s.out[l] * s.NP) : Du[l]);
      D_rows.push_back(clip ? arena.take<T>(s.NP * s.ld[l]) : Du_rows[l]);
      factor.push_back(clip ? arena.take<T>(s.NP) : nullptr);
    }
    V = arena.take<T>(s.D * s.NP);
  }
  std::vector<T*> X;                // [rows][NP]
  std::vector<T*> Z, F;             // outputs [out][NP] and, below the top, phi'(Z)
  std::vector<T*> G;                // gradient at the next layer's input
  std::vector<T*> Du, D;            // gradient at Z, before and after clipping
  std::vector<T*> Du_rows, D_rows;  // the same as [NP][ld]
  std::vector<T*> factor;           // of the clipping
  T* V;
};

template <typename T>
struct MemoryCore {
  MemoryCore(const MemoryParams& params, Carver& arena) : p(params), s(params) {
    co.take(arena, s.NP);
    A.push_back(arena.take<T>(s.rows[0] * s.NP));
    for (size_t l = 0; l < s.L; ++l) {
      Y.push_back(arena.take<T>(s.out[l] * s.NP));
      if (l + 1 < s.L) {
        A.push_back(arena.take<T>(s.rows[l + 1] * s.NP));
        FY.push_back(arena.take<T>(s.out[l] * s.NP));
      }
      scores.push_back(arena.take<T>(s.NP * s.NP));
      minus_P.push_back(arena.take<T>(s.NP * s.NP));
    }
    tmp = arena.take<T>(s.widest * s.NP);
    small = arena.take<T>(s.NP * s.NP);
    gain = arena.take<T>(s.D);
    offset = arena.take<T>(s.D);
    if (p.anchor != nullptr) anchor = arena.take<T>(s.padded);
  }

  const T* head(const void* t, int64_t size, int64_t h) const {
    return static_cast<const T*>(t) + h * size;
  }

  void load_head(int64_t h) {
    if (p.anchor != nullptr) s.load(head(p.anchor, s.flat, h), anchor);
    if (p.residual_norm) {
      std::copy_n(head(p.norm_weight, s.D, h), s.D, gain);
      std::copy_n(head(p.norm_bias, s.D, h), s.D, offset);
    }
  }

  // [n,H,D] rows of head h from token `first` on, as [D][NP] with zeros behind.
  void load_tokens(const void* src, int64_t first, int64_t n, int64_t h, T* dst) const {
    std::fill_n(dst, s.D * s.NP, T(0));
    transpose_any(n, s.D, static_cast<const T*>(src) + (first * p.H + h) * s.D, p.H * s.D, dst,
                  s.NP);
  }
  void store_tokens(const T* src, int64_t first, int64_t n, int64_t h, void* dst) const {
    transpose_any(s.D, n, src, s.NP, static_cast<T*>(dst) + (first * p.H + h) * s.D, p.H * s.D);
  }
  // The constant input channel of the biases.
  void set_ones(T* x, size_t l, int64_t n) const {
    if (s.bias == 0) return;
    T* row = x + s.in[l] * s.NP;
    std::fill_n(row, s.NP, T(0));
    std::fill_n(row, n, T(1));
  }
  // [out][NP] as [NP][ld], with zeros behind.
  void to_rows(size_t l, const T* x, T* rows) const {
    if (s.ld[l] != s.out[l]) std::fill_n(rows, s.NP * s.ld[l], T(0));
    transpose_any(s.out[l], s.NP, x, s.NP, rows, s.ld[l]);
  }

  template <Into kInto, bool kTransA>
  void token_product(size_t m, size_t k, const T* a, size_t lda, const T* b, T* c) const {
    if constexpr (kInto == Into::kSet) {
      token_gemm<kTransA>(FromZero<T>(), m, s.NP, k, a, lda, b, c);
    } else {
      token_gemm<kTransA>(FromMatrix<T>{c, s.NP}, m, s.NP, k, a, lda, b, c);
    }
  }
  // y[out,t] = W_l^T x, or the same added.
  template <Into kInto>
  void apply(size_t l, const T* W, const T* x, T* y) const {
    token_product<kInto, true>(s.out[l], s.rows[l], W + s.at[l], s.ld[l], x, y);
  }
  // x[count,t] = W_l y for the first `count` inputs, or the same added.
  template <Into kInto>
  void apply_transposed(size_t l, size_t count, const T* W, const T* y, T* x) const {
    token_product<kInto, false>(count, s.out[l], W + s.at[l], s.ld[l], y, x);
  }
  // W_l += x d^T over the first `count` inputs; d as [NP][ld].
  void add_outer(size_t l, size_t count, int64_t n, const T* x, const T* d_rows, T* W) const {
    gemm<Into::kAdd, false>(count, s.ld[l], n, x, s.NP, d_rows, s.ld[l], W + s.at[l], s.ld[l]);
  }

  // Mean and 1 / sqrt(var + eps) over the D rows at lane j.
  template <class Tg, class Vt>
  void moments(Tg d, const T* z, size_t j, Vt& mean, Vt& rstd) const {
    auto sum = hn::Zero(d), squares = hn::Zero(d);
    for (size_t i = 0; i < s.D; ++i) sum = hn::Add(sum, hn::Load(d, z + i * s.NP + j));
    const auto scale = hn::Set(d, T(1) / static_cast<T>(s.D));
    mean = hn::Mul(sum, scale);
    for (size_t i = 0; i < s.D; ++i) {
      const auto e = hn::Sub(hn::Load(d, z + i * s.NP + j), mean);
      squares = hn::MulAdd(e, e, squares);
    }
    const auto var = hn::MulAdd(squares, scale, hn::Set(d, static_cast<T>(p.norm_eps)));
    rstd = hn::Div(hn::Set(d, T(1)), hn::Sqrt(var));
  }

  // y = N(e) rstd for rows e = f(i, x^): subtracts mean and the part along x^.
  template <class F>
  void project(const T* z, const F& f, T* y) const {
    const Tag<T> d;
    const auto scale = hn::Set(d, T(1) / static_cast<T>(s.D));
    for (size_t j = 0; j < s.NP; j += hn::Lanes(d)) {
      auto mean = hn::Zero(d), rstd = hn::Zero(d);
      moments(d, z, j, mean, rstd);
      auto sum = hn::Zero(d), along = hn::Zero(d);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * s.NP + j;
        const auto x = hn::Mul(hn::Sub(hn::Load(d, z + at), mean), rstd);
        const auto e = f(d, i, at, x);
        sum = hn::Add(sum, e);
        along = hn::MulAdd(e, x, along);
        hn::Store(e, d, y + at);
      }
      sum = hn::Mul(sum, scale);
      along = hn::Mul(along, scale);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * s.NP + j;
        const auto x = hn::Mul(hn::Sub(hn::Load(d, z + at), mean), rstd);
        const auto e = hn::Sub(hn::Load(d, y + at), hn::MulAdd(x, along, sum));
        hn::Store(hn::Mul(e, rstd), d, y + at);
      }
    }
  }

  // phi of y below the top: the next layer's input, and the derivative.
  void activate_layer(size_t l, const T* y, T* next, T* slope, int64_t n) const {
    for_tokens<T>(s.out[l], s.NP, [&](auto d, size_t i, size_t) HWY_ATTR {
      auto f = hn::Zero(d), f1 = hn::Zero(d), f2 = hn::Zero(d);
      activate(d, p.activation, hn::Load(d, y + i), f, f1, f2);
      hn::Store(f, d, next + i);
      hn::Store(f1, d, slope + i);
    });
    set_ones(next, l + 1, n);
  }

  // Gradients of the chunk's tokens at the weights Wg.
  void key_pass(int64_t first, const ChunkKind& kind, int64_t h, const T* Wg, KeyPass<T>& key) {
    const int64_t n = kind.n;
    load_tokens(p.k, first, n, h, key.X[0]);
    load_tokens(p.v, first, n, h, key.V);
    set_ones(key.X[0], 0, n);
    for (size_t l = 0; l < s.L; ++l) {
      apply<Into::kSet>(l, Wg, key.X[l], key.Z[l]);
      if (l + 1 < s.L) activate_layer(l, key.Z[l], key.X[l + 1], key.F[l], n);
    }
    top_gradient(n, key);
    for (size_t l = s.L - 1; l > 0; --l) {
      apply_transposed<Into::kSet>(l, s.out[l - 1], Wg, key.Du[l], key.G[l - 1]);
      const T *g = key.G[l - 1], *f = key.F[l - 1];
      T* out = key.Du[l - 1];
      for_tokens<T>(s.out[l - 1], s.NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Mul(hn::Load(d, g + i), hn::Load(d, f + i)), d, out + i);
      });
    }
    for (size_t l = 0; l < s.L; ++l) {
      to_rows(l, key.Du[l], key.Du_rows[l]);
      if (p.clip > 0) clip_layer(l, key);
    }
  }

  void top_gradient(int64_t n, KeyPass<T>& key) {
    const size_t top = s.L - 1;
    const T *z = key.Z[top], *k = key.X[0], *v = key.V;
    T* out = key.Du[top];
    const T c = static_cast<T>(p.loss_scale);
    if (!p.residual_norm) {
      for_tokens<T>(s.D, s.NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Mul(hn::Set(d, c), hn::Sub(hn::Load(d, z + i), hn::Load(d, v + i))), d,
                  out + i);
      });
      return;
    }
    project(
        z,
        [&](auto d, size_t i, size_t at, auto x) HWY_ATTR {
          const auto target = hn::Sub(hn::Load(d, v + at), hn::Load(d, k + at));
          const auto g = hn::Set(d, gain[i]);
          return hn::Mul(g, hn::Sub(hn::MulAdd(g, x, hn::Set(d, offset[i])), target));
        },
        out);
    // LN of the empty lanes is not zero.
    for (size_t t = 0; t < s.NP; ++t) tmp[t] = static_cast<int64_t>(t) < n ? c : T(0);
    scale_tokens(s.D, s.NP, tmp, out, out);
  }

  // D_t *= min(1, clip / (|x_t| |D_t|)).
  void clip_layer(size_t l, KeyPass<T>& key) {
    T* f = key.factor[l];
    T* xx = small;
    std::fill_n(f, s.NP, T(0));
    std::fill_n(xx, s.NP, T(0));
    dot_tokens(s.out[l], s.NP, key.Du[l], key.Du[l], T(1), f);
    dot_tokens(s.rows[l], s.NP, key.X[l], key.X[l], T(1), xx);
    for (size_t t = 0; t < s.NP; ++t) {
      const T norm = std::sqrt(f[t] * xx[t]);
      f[t] = norm > static_cast<T>(p.clip) ? static_cast<T>(p.clip) / norm : T(1);
    }
    scale_tokens(s.out[l], s.NP, f, key.Du[l], key.D[l]);
    to_rows(l, key.D[l], key.D_rows[l]);
  }

  // Depth 1 with every gradient at M before its token: solves (I + Z) D = c (beta- K M + cc- K S -
  // V) into key.D. On return `strict` holds -Z, and `kk` the products k_i . k_j.
  void solve(int64_t first, const ChunkKind& kind, int64_t h, const T* M, const T* S,
             KeyPass<T>& key, T* strict, T* kk) {
    const int64_t n = kind.n;
    const T c = static_cast<T>(p.loss_scale);
    load_tokens(p.k, first, n, h, key.X[0]);
    load_tokens(p.v, first, n, h, key.V);
    set_ones(key.X[0], 0, n);
    const T* x = key.X[0];
    gemm<Into::kSet, true>(s.NP, s.NP, s.rows[0], x, s.NP, x, s.NP, kk, s.NP);
    std::fill_n(strict, s.NP * s.NP, T(0));
    for (int64_t i = 1; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        strict[i * s.NP + j] = -c * co.rate[j] * co.H[(i - 1) * s.NP + j] * kk[i * s.NP + j];
      }
    }
    T* y = key.Du[0];
    apply<Into::kSet>(0, M, x, y);
    if (kind.use_s) apply<Into::kSet>(0, S, x, key.Z[0]);
    const T *z = key.Z[0], *v = key.V;
    for (int64_t t = 0; t < s.NP; ++t) {  // beta and cc of the token before
      tmp[t] = t == 0 || t >= n ? c : c * co.beta[t - 1];
      tmp[s.NP + t] = t == 0 || t >= n ? T(0) : c * co.cc[t - 1];
    }
    const T *b = tmp, *cc = tmp + s.NP;
    for_tokens<T>(s.D, s.NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
      auto e = hn::Mul(hn::Load(d, b + j), hn::Load(d, y + i));
      if (kind.use_s) e = hn::MulAdd(hn::Load(d, cc + j), hn::Load(d, z + i), e);
      hn::Store(hn::NegMulAdd(hn::Set(d, c), hn::Load(d, v + i), e), d, y + i);
    });
    solve_rows<false>(strict, y, key.Du_rows[0]);
  }

  // y[D][NP] <- the tokens' solution of (I - strict) X = Y or of its transpose; also as rows.
  template <bool kTransposed>
  void solve_rows(const T* strict, T* y, T* rows) const {
    to_rows(0, y, rows);
    const size_t width = panel_width<T>();
    for (size_t j = 0; j < s.ld[0]; j += width) {
      const size_t columns = std::min(width, s.ld[0] - j);
      if (kTransposed) {
        solve_lower_transposed(s.NP, columns, strict, s.NP, UnitFactors<T>(), rows + j, s.ld[0],
                               static_cast<T*>(nullptr));
      } else {
        solve_lower(s.NP, columns, strict, s.NP, UnitFactors<T>(), rows + j, s.ld[0],
                    static_cast<T*>(nullptr));
      }
    }
    transpose_any(s.NP, s.out[0], rows, s.ld[0], y, s.NP);
  }

  // What the tokens read: A, Y, their slopes; the output's LN is left to the callers. M and S at
  // the call's start.
  void read_pass(int64_t first, const ChunkKind& kind, int64_t h, const T* M, const T* S,
                 const KeyPass<T>& key) {
    load_tokens(p.q, first, kind.n, h, A[0]);
    set_ones(A[0], 0, kind.n);
    for (size_t l = 0; l < s.L; ++l) {
      gemm<Into::kSet, true>(s.NP, s.NP, s.rows[l], key.X[l], s.NP, A[l], s.NP, scores[l], s.NP);
      const T *score = scores[l], *om = co.om_t;
      T* mp = minus_P[l];
      for_tokens<T>(s.NP, s.NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Neg(hn::Mul(hn::Load(d, om + i), hn::Load(d, score + i))), d, mp + i);
      });
      T* y = Y[l];
      apply<Into::kSet>(l, M, A[l], y);
      if (p.rule == MemoryRule::kLmm) scale_tokens(s.out[l], s.NP, co.read_beta, y, y);
      auto add = [&](const T* W, const T* weights) HWY_ATTR {
        apply<Into::kSet>(l, W, A[l], tmp);
        const T* u = tmp;
        for_tokens<T>(s.out[l], s.NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
          hn::Store(hn::MulAdd(hn::Load(d, weights + j), hn::Load(d, u + i), hn::Load(d, y + i)), d,
                    y + i);
        });
      };
      if (kind.use_s) add(S, co.read_cc);
      if (anchor != nullptr) add(anchor, co.read_rest);
      token_product<Into::kAdd, false>(s.out[l], s.NP, key.D[l], s.NP, mp, y);
      if (l + 1 < s.L) activate_layer(l, y, A[l + 1], FY[l], kind.n);
    }
  }

  // The output of the read pass into tmp [D][NP].
  void output() {
    const T *y = Y[s.L - 1], *q = A[0];
    if (!p.residual_norm) {
      std::copy_n(y, s.D * s.NP, tmp);
      return;
    }
    const Tag<T> d;
    for (size_t j = 0; j < s.NP; j += hn::Lanes(d)) {
      auto mean = hn::Zero(d), rstd = hn::Zero(d);
      moments(d, y, j, mean, rstd);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * s.NP + j;
        const auto x = hn::Mul(hn::Sub(hn::Load(d, y + at), mean), rstd);
        const auto f = hn::MulAdd(hn::Set(d, gain[i]), x, hn::Set(d, offset[i]));
        hn::Store(hn::Add(f, hn::Load(d, q + at)), d, tmp + at);
      }
    }
  }

  // M and S after the chunk, in place or into the next chunk's.
  void end(const ChunkKind& kind, const KeyPass<T>& key, const T* M, const T* S, T* M_out,
           T* S_out) {
    const bool clears = kind.complete && p.rule == MemoryRule::kTtt;
    for (size_t l = 0; l < s.L; ++l) {
      const size_t at = s.at[l], ld = s.ld[l];
      const T* sum = kind.use_s ? S + at : nullptr;
      auto make = [&](FromSum<T> from, const T* weights, T* to) HWY_ATTR {
        const T* x = key.X[l];
        T* scaled = tmp;
        for_tokens<T>(s.rows[l], s.NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
          hn::Store(hn::Neg(hn::Mul(hn::Load(d, weights + j), hn::Load(d, x + i))), d, scaled + i);
        });
        gemm<false>(from, s.rows[l], ld, {static_cast<size_t>(kind.n)}, scaled, s.NP, key.D_rows[l],
                    ld, to + at, ld);
      };
      if (kind.write_m) {
        make({co.beta_n, M + at, co.c_n, sum, T(1) - co.beta_n,
              anchor != nullptr ? anchor + at : nullptr, ld},
             co.lam, M_out);
      }
      if (kind.write_s) make({co.m_n, S + at, T(0), nullptr, T(0), nullptr, ld}, co.kap, S_out);
    }
    if (!kind.write_m && M_out != M) std::copy_n(M, s.padded, M_out);
    if (clears && (kind.use_s || S_out != S)) std::fill_n(S_out, s.padded, T(0));
  }

  const MemoryParams& p;
  MemoryShape<T> s;
  Coefficients<T> co;
  std::vector<T*> A, Y, FY;         // the reads: inputs, outputs, phi' of the outputs
  std::vector<T*> scores, minus_P;  // [j][t]: x_j . a_t, and times -Om
  T *tmp, *small, *gain, *offset;
  T* anchor = nullptr;  // [padded]
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
