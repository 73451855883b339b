// SPDX-License-Identifier: Apache-2.0
// The chunk form backward: one chunk of one key head with its value heads. backward_run-inl.h goes
// through the chunks. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_BACKWARD_INL_H_
#undef GDN_KERNELS_DELTA_RULE_BACKWARD_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_BACKWARD_INL_H_
#endif

#include "gdn/kernels/delta_rule/core-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Per chunk and value head, in this order: prepare; retreat_values for each panel; key_products;
// retreat_state for each panel, which may also come before key_products if the gradient of the
// state at the chunk's end is kept; head_grads. Before the first value head begin_keys, after the
// last store_keys.
template <typename T_, typename CoreType = Core<T_>>
struct ChunkBackward {
  using T = T_;
  struct Scope {
    explicit Scope(const ChunkBackward&) {}
  };
  static Layout<T> layout(const DeltaRuleParams& params) { return Layout<T>(params); }

  // `shared`: threads may work on different panels of a chunk at the same time.
  ChunkBackward(const DeltaRuleParams& params, Carver& carve, [[maybe_unused]] bool shared = false)
      : core(params, carve) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, W = L.W, V = L.panels * PW;
    values = carve.take<T>(V * W * C);
    xdo = carve.take<T>(V * 2 * C);
    if (!CoreType::kPairs) {
      valuesT = carve.take<T>(V * W * C);
      xdoT = carve.take<T>(V * 2 * C);
    }
    if (W == 2) d_v = carve.take<T>(V * C);
    if (params.beta != nullptr) {
      rests = carve.take<T>(V * C);
      d_betas = carve.take<T>(V * C);
      d_beta = carve.take<T>(L.panels * C);
    }
    dZ = carve.take<T>(2 * C * W * C);
    readT = carve.take<T>(Kp * 2 * C);
    writeT = carve.take<T>(Kp * W * C);
    d_bq = carve.take<T>(2 * C * Kp);
    d_w = carve.take<T>(W * C * Kp);
    d_end = carve.take<T>(Kp);
    dG = carve.take<T>(L.channel ? C * Kp : C);
    sum_bq = L.group > 1 ? carve.take<T>(2 * C * Kp) : d_bq;
    sum_w = L.group > 1 ? carve.take<T>(W * C * Kp) : d_w;
    tmp = carve.take<T>(C * Kp);
  }

  void begin_keys(int64_t t, size_t count, int64_t h) {
    const auto& L = core.L;
    core.load_keys(t, count, h);
    if (L.group == 1) return;
    std::fill_n(sum_bq, 2 * L.C * L.Kp, T(0));
    std::fill_n(sum_w, L.W * L.C * L.Kp, T(0));
  }

  void store_keys(const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t h) {
    const auto& x = core.x;
    const size_t half = core.L.C * core.L.Kp;
    T* dk = sum_w + (core.L.W - 1) * half;
    if (x.erase == DeltaErase::kKey) add_scaled(half, sum_bq, T(1), sum_w);
    if (x.l2norm_qk) {
      core.query_norm_grads(count, sum_bq + half);
      core.key_norm_grads(count, dk);
    }
    store_rows(grads.dq, t, count, h, sum_bq + half);
    store_rows(grads.dk, t, count, h, dk);
    if (delta_rule::has_a(x.erase)) store_rows(grads.da, t, count, h, sum_bq);
    if (x.erase == DeltaErase::kSeparate) store_rows(grads.dp, t, count, h, sum_w);
  }

  // What advance needs of a chunk, but for the readers.
  void begin_advance(const T* saved, int64_t t, size_t count, int64_t hv) {
    core.load_keys(t, count, hv / core.L.group, /*with_readers=*/false);
    core.load_gate(t, count, hv);
    load_written(saved, t, count, hv);
  }
  // next = the state at the chunk's end, panel p.
  void advance(size_t p, const T* state, T* next) {
    const auto& L = core.L;
    core.advance_state(p, values + p * L.W * L.C * L.PW, state, next);
  }

  // Calls of the prefetcher, at most, by key_products and retreat_state, and by advance for all
  // panels.
  size_t pauses() const {
    const auto& L = core.L;
    const size_t reads = 2 * L.C - L.first, tile = kTileRows * L.PW;
    const size_t products = (L.W * L.C + reads) * L.Kp * L.panels / tile;
    return std::max<size_t>(1, products + L.panels * L.Kp * reads / (kSub * kTileRows));
  }
  size_t advance_pauses() const {
    const auto& L = core.L;
    return L.panels * L.Kp * L.W * L.C / (kSub * kTileRows);
  }

  // The values the chunk wrote: U, and V behind it in the separate form. Where there is a beta,
  // what forward saved (or v) comes without it, and is kept in `rests`.
  void load_written(const T* saved, int64_t t, size_t count, int64_t hv) {
    const auto& x = core.x;
    const size_t half = core.L.C * core.L.PW, stride = core.L.W * half;
    const bool erases = x.erase != DeltaErase::kNone, has_beta = x.beta != nullptr;
    core.load_values(erases ? kDTypeOf<T> : x.dtype, erases ? saved : x.v, t, count, hv,
                     has_beta ? rests : values, stride);
    if (has_beta) {
      core.load_betas(t, count, hv);
      for (size_t p = 0; p < core.L.panels; ++p) {
        core.times_beta(p, rests + p * half, values + p * half);
      }
    }
    if (x.erase == DeltaErase::kSeparate) {
      core.load_values(x.dtype, x.v, t, count, hv, values + half, stride);
    }
  }

  void prepare(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t hv) {
    core.load_gate(t, count, hv);
    core.decay_readers();
    core.scores();
    load_written(saved, t, count, hv);
    load_output_grads(grads, t, count, hv);
  }
  void load_output_grads(const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t hv) {
    const auto& L = core.L;
    const size_t half = L.C * L.PW;
    if (grads.d_o != nullptr) {
      core.load_values(core.x.dtype, grads.d_o, t, count, hv, xdo + half, 2 * half);
    } else {
      for (size_t p = 0; p < L.panels; ++p) std::fill_n(xdo + (2 * p + 1) * half, half, T(0));
    }
  }

  // From ds, panel p of the gradient of the state at the chunk's end: X (without an erase, dU), and
  // the values' gradient.
  void retreat_values(size_t p, const T* ds) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, WC = L.W * C, columns = L.columns(p);
    T *X = xdo + p * 2 * C * PW, *d_out = X + C * PW;
    for (size_t half = 0; half < L.W; ++half) {
      gemm<false>(FromTriangle<T, true>{core.Z + C * WC + half * C, WC, d_out, PW, C}, C, columns,
                  {L.Kp}, core.wEh + half * C * L.Kp, L.Kp, ds, PW,
                  half == 0 ? X : d_v + p * C * PW, PW);
    }
    const bool has_beta = core.x.beta != nullptr;
    T* d_u = has_beta ? d_betas + p * C * PW : nullptr;  // the gradient of U itself
    if (L.first == 0) {
      core.with_beta(p, [&](auto factors) HWY_ATTR {
        solve_lower_transposed(C, columns, core.Z, WC, factors, X, PW, d_u);
      });
    } else if (has_beta) {
      std::copy_n(X, C * PW, d_u);
      core.times_beta(p, X, X);
    }
    if (has_beta) beta_grads(columns, rests + p * C * PW, d_u, d_beta + p * C);
    if (L.W == 2) {
      gemm_lower_transposed(C, columns, core.Z + C, WC, X, PW, d_v + p * C * PW, PW);
    }
  }

  // next = the gradient of the state at the chunk's start, panel p; next may be ds.
  void retreat_state(size_t p, const T* ds, T* next) {
    const auto& L = core.L;
    const FromScaledRows<T> decayed{ds, L.PW, core.end_decay(), L.channel ? size_t{1} : 0};
    const Depth depth{kSub, (2 * L.C - L.first) / kSub, kSub * L.Kp, kSub * L.PW};
    gemm<true>(decayed, L.Kp, L.columns(p), depth, core.bqE + L.first * L.Kp, L.Kp,
               xdo + (p * 2 * L.C + L.first) * L.PW, L.PW, next, L.PW,
               [this]() HWY_ATTR { core.ahead.some_lines(); });
  }

  // What the keys' gradients need of the states at the chunk's start (s) and end (ds: gradient).
  void key_products(const T* s, const T* ds) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, WC = L.W * C, first = L.first;
    for (size_t p = 0; p < L.panels; ++p) {
      transpose(WC, L.columns(p), values + p * WC * PW, PW, valuesT + p * PW * WC, WC);
      transpose(2 * C - first, L.columns(p), xdo + (p * 2 * C + first) * PW, PW,
                xdoT + p * PW * 2 * C + first, 2 * C);
    }
    for (size_t half = first; half < 2 * C; half += C) {
      for (size_t r = 0; r < C; r += kSub) {
        for (size_t w = 0; w < WC; w += C) {
          over_values(kSub, r + kSub, xdo + (half + r) * PW, 2 * C * PW, valuesT + w, WC,
                      dZ + (half + r) * WC + w);
        }
      }
    }
    over_values(Kp, WC, ds, Kp * PW, valuesT, WC, writeT);
    over_values(Kp, 2 * C - first, s, Kp * PW, xdoT + first, 2 * C, readT + first);
    end_gradient(s, ds);
  }
  // What the chunk's whole decay gets from the state it multiplies.
  void end_gradient(const T* s, const T* ds) {
    const auto& L = core.L;
    const size_t Kp = L.Kp, PW = L.PW;
    if (core.x.gate == DeltaGate::kNone) return;
    const Tag<T> d;
    const T* end = core.end_decay();
    auto total = hn::Zero(d);
    for (size_t i = 0; i < Kp; ++i) {
      auto sum = hn::Zero(d);
      for (size_t p = 0; p < L.panels; ++p) {
        const size_t row = (p * Kp + i) * PW;
        for (size_t j = row; j < row + L.columns(p); j += hn::Lanes(d)) {
          sum = hn::MulAdd(hn::Load(d, ds + j), hn::Load(d, s + j), sum);
        }
      }
      if (L.channel) {
        d_end[i] = end[i] * hn::GetLane(hn::SumOfLanes(d, sum));
      } else {
        total = hn::Add(total, sum);
      }
    }
    if (L.channel) return;
    std::fill_n(d_end, Kp, T(0));
    d_end[0] = end[0] * hn::GetLane(hn::SumOfLanes(d, total));
  }

  // The gradients of one value head: stored, and those of the keys added to the group's.
  void head_grads(const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t hv) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t half = L.C * L.PW;
    if (L.W == 2) {
      core.store_values(x.dtype, grads.dv, t, count, hv, d_v, half);
    } else {
      core.store_values(x.dtype, grads.dv, t, count, hv, xdo, 2 * half);
    }
    key_grads();
    gate_grads(grads, t, count, hv);
    if (L.group == 1) return;
    add_scaled((2 * L.C - L.first) * L.Kp, d_bq + L.first * L.Kp, T(1), sum_bq + L.first * L.Kp);
    add_scaled(L.W * L.C * L.Kp, d_w, T(1), sum_w);
  }

 protected:
  void store_rows(void* dst, int64_t t, size_t count, int64_t h, const T* src) const {
    const auto& x = core.x;
    for (size_t i = 0; i < count; ++i) {
      store_row(x.dtype, dst, ((t + i) * x.H + h) * x.K, x.K, src + i * core.L.Kp);
    }
  }

  // C[m,n] = A B where the columns of A, `a_step` apart from panel to panel, and the rows of B are
  // values.
  void over_values(size_t m, size_t n, const T* a, size_t a_step, const T* b, size_t ldb, T* c) {
    const auto& L = core.L;
    const size_t PW = L.PW, full = L.full_panels();
    const auto between = [this]() HWY_ATTR { core.ahead.some_lines(); };
    gemm<false>(FromZero<T>(), m, n, {PW, full, a_step, PW * ldb}, a, PW, b, ldb, c, ldb, between);
    if (full == L.panels) return;
    gemm<Into::kAdd, false>(m, n, L.columns(full), a + full * a_step, PW, b + full * PW * ldb, ldb,
                            c, ldb);
  }

  // From U without beta, and the gradient of U, one panel: beta's gradient in place of the latter.
  void beta_grads(size_t columns, const T* rest, T* d_u, T* sums) const {
    const size_t PW = core.L.PW;
    const Tag<T> d;
    for (size_t i = 0; i < core.L.C; ++i) {
      auto sum = hn::Zero(d);
      for (size_t j = i * PW; j < i * PW + columns; j += hn::Lanes(d)) {
        const auto product = hn::Mul(hn::Load(d, rest + j), hn::Load(d, d_u + j));
        hn::Store(product, d, d_u + j);
        sum = hn::Add(sum, product);
      }
      sums[i] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }

  // d_bq and d_w from dZ, readT and writeT.
  void key_grads() {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, WC = L.W * C;
    transpose(Kp, 2 * C - L.first, readT + L.first, 2 * C, d_bq + L.first * Kp, Kp);
    if (L.first == 0) scale_rows<T>(C, Kp, d_bq, core.erase_decay(), L.channel, core.f, d_bq);
    scale_rows<T>(C, Kp, d_bq + C * Kp, core.query_decay(), L.channel, core.f + C, d_bq + C * Kp);
    transpose(Kp, WC, writeT, WC, d_w, Kp);
    for (size_t half = 0; half < L.W; ++half) {
      T* dw = d_w + half * C * Kp;
      scale_rows<T>(C, Kp, dw, core.Eh, L.channel, nullptr, dw);
      for (size_t j = 0; j < C; ++j) core.add_writer_product(half * C + j, dw + j * Kp, d_end);
    }
    for (size_t i = L.first; i < 2 * C; ++i) {
      core.apply_decay(i, core.f[i], dZ + i * WC);
    }
    for (size_t half = 0; half < L.W; ++half) {
      const T* ws = core.w + half * C * Kp;
      T* dw = d_w + half * C * Kp;
      if (L.channel) {
        for (size_t r = 0; r < C; r += kSub) channel_grads(r, ws, dZ + half * C, dw);
        continue;
      }
      if constexpr (CoreType::kPairs) {
        core.score_grads(dZ, d_bq, dw);
        continue;
      }
      if (L.first == 0) {
        gemm_lower(C, Kp, dZ + half * C, WC, ws, Kp, d_bq, Kp);
        gemm_lower_transposed(C, Kp, dZ + half * C, WC, core.bq, Kp, dw, Kp);
      }
      gemm_lower(C, Kp, dZ + C * WC + half * C, WC, ws, Kp, d_bq + C * Kp, Kp);
      gemm_lower_transposed(C, Kp, dZ + C * WC + half * C, WC, core.bq + C * Kp, Kp, dw, Kp);
    }
  }

  // The derivative of Core::channel_scores.
  void channel_grads(size_t r, const T* ws, const T* dz, T* dw) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, ld = L.W * C;
    const Tag<T> d;
    const T* query_dz = dz + C * ld;
    core.decay_sub_block(r, core.bq, ws);
    const bool factors = core.divide_sub_block(r, ws);
    const size_t n = factors ? r + kSub : r;
    if (n > 0) {
      const T* sub_q = core.sub_bq + kSub * Kp;
      if (L.first == 0) {
        gemm<Into::kSet, false>(kSub, Kp, n, dz + r * ld, ld, core.sub_w, Kp, tmp, Kp);
        add_decayed_rows(r, L.old_state, tmp, d_bq + r * Kp);
      }
      gemm<Into::kSet, false>(kSub, Kp, n, query_dz + r * ld, ld, core.sub_w, Kp, tmp, Kp);
      add_decayed_rows(r, false, tmp, d_bq + (C + r) * Kp);
      gemm<Into::kSet, true>(n, Kp, kSub, query_dz + r * ld, ld, sub_q, Kp, tmp, Kp);
      if (L.first == 0)
        gemm<Into::kAdd, true>(n, Kp, kSub, dz + r * ld, ld, core.sub_bq, Kp, tmp, Kp);
      add_to_writers(r, n, dw);
    }
    if (factors) return;
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      for (size_t j = r; j < r + kSub; ++j) diagonal_grads(j, r + kSub, c, ws, dz, dw);
    }
  }

  // dw_j += (e_j+1 .. e_r-1) * tmp_j for j < r, and tmp_j / (e_r .. e_j) for r <= j < n.
  void add_to_writers(size_t r, size_t n, T* dw) const {
    const size_t Kp = core.L.Kp;
    const Tag<T> d;
    const auto add = [&](size_t j, size_t c, hn::Vec<Tag<T>> factor) HWY_ATTR {
      T* row = dw + j * Kp + c;
      hn::Store(hn::MulAdd(factor, hn::Load(d, tmp + j * Kp + c), hn::Load(d, row)), d, row);
    };
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      auto decay = hn::Set(d, T(1));
      for (size_t j = r; j-- > 0;) {
        add(j, c, decay);
        decay = hn::Mul(decay, hn::Load(d, core.e + j * Kp + c));
      }
      if (n == r) continue;
      decay = hn::Load(d, core.e + r * Kp + c);
      for (size_t j = r + 1; j < n; ++j) decay = hn::Mul(decay, hn::Load(d, core.e + j * Kp + c));
      auto inverse = hn::Div(hn::Set(d, T(1)), decay);
      for (size_t j = n; j-- > r;) {
        add(j, c, inverse);
        inverse = hn::Mul(inverse, hn::Load(d, core.e + j * Kp + c));
      }
    }
  }

  // rows[i] += (e_r .. e_i) * x_i, or (e_r .. e_i-1) * x_i if the reader sees the state before its
  // decay.
  void add_decayed_rows(size_t r, bool before_decay, const T* x, T* rows) {
    const size_t Kp = core.L.Kp;
    const Tag<T> d;
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      auto decay = hn::Set(d, T(1));
      for (size_t i = 0; i < kSub; ++i) {
        const auto before = decay;
        decay = hn::Mul(decay, hn::Load(d, core.e + (r + i) * Kp + c));
        const auto sum = hn::MulAdd(before_decay ? before : decay, hn::Load(d, x + i * Kp + c),
                                    hn::Load(d, rows + i * Kp + c));
        hn::Store(sum, d, rows + i * Kp + c);
      }
    }
  }

  // Write key j against the readers i = j .. end-1, channels c .. c + lanes-1.
  void diagonal_grads(size_t j, size_t end, size_t c, const T* ws, const T* dz, T* dw) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, ld = L.W * C;
    const Tag<T> d;
    const auto add = [&](T* row, T factor, hn::Vec<Tag<T>> y) {
      hn::Store(hn::MulAdd(hn::Set(d, factor), y, hn::Load(d, row)), d, row);
    };
    auto carried = hn::Load(d, ws + j * Kp + c);
    add(d_bq + (C + j) * Kp + c, dz[(C + j) * ld + j], carried);
    for (size_t i = j + 1; i < end; ++i) {
      const auto before = carried;
      carried = hn::Mul(carried, hn::Load(d, core.e + i * Kp + c));
      if (L.first == 0) add(d_bq + i * Kp + c, dz[i * ld + j], L.old_state ? before : carried);
      add(d_bq + (C + i) * Kp + c, dz[(C + i) * ld + j], carried);
    }
    auto sum = hn::Zero(d);
    for (size_t i = end - 1; i > j; --i) {
      const auto decay = hn::Load(d, core.e + i * Kp + c);
      const auto q = hn::Load(d, core.bq + (C + i) * Kp + c);
      sum = hn::MulAdd(hn::Set(d, dz[(C + i) * ld + j]), q, sum);
      if (L.first == 0) {
        const auto b = hn::Mul(hn::Set(d, dz[i * ld + j]), hn::Load(d, core.bq + i * Kp + c));
        sum = L.old_state ? hn::MulAdd(sum, decay, b) : hn::Mul(hn::Add(sum, b), decay);
      } else {
        sum = hn::Mul(sum, decay);
      }
    }
    sum =
        hn::MulAdd(hn::Set(d, dz[(C + j) * ld + j]), hn::Load(d, core.bq + (C + j) * Kp + c), sum);
    hn::Store(hn::Add(sum, hn::Load(d, dw + j * Kp + c)), d, dw + j * Kp + c);
  }

  // dbeta, then dg from the keys and their gradients.
  void gate_grads(const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t hv) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, WC = L.W * C;
    if (x.channel_beta) {
      core.store_values(kDTypeOf<T>, grads.dbeta, t, count, hv, d_betas, C * L.PW);
    } else if (x.beta != nullptr) {
      for (size_t i = 0; i < count; ++i) {
        T sum = T(0);
        for (size_t p = 0; p < L.panels; ++p) sum += d_beta[p * C + i];
        static_cast<T*>(grads.dbeta)[(t + i) * x.HV + hv] = sum;
      }
    }
    if (x.gate == DeltaGate::kNone) return;
    // dG_i is what token i's cumulated decay gets; the erase of the separate form reads that of
    // token i-1.
    const size_t shift = L.old_state ? 1 : 0;
    T* dg = static_cast<T*>(grads.dg);
    if (L.channel) {
      std::fill_n(dG, C * Kp, T(0));
      add_product(C * Kp, core.bq + C * Kp, d_bq + C * Kp, dG);
      if (L.first == 0) {
        add_product((C - shift) * Kp, core.bq + shift * Kp, d_bq + shift * Kp, dG);
      }
      for (size_t i = 0; i < L.W; ++i)
        subtract_product(C * Kp, core.w + i * C * Kp, d_w + i * C * Kp, dG);
      add_scaled(Kp, d_end, T(1), dG + (C - 1) * Kp);
      for (size_t i = C - 1; i > 0; --i) add_scaled(Kp, dG + i * Kp, T(1), dG + (i - 1) * Kp);
      for (size_t i = 0; i < count; ++i) {
        std::copy_n(dG + i * Kp, L.K, dg + ((t + i) * x.HV + hv) * x.K);
      }
      return;
    }
    for (size_t i = 0; i < C; ++i) {
      dG[i] = core.dot_reader(C + i, d_bq + (C + i) * Kp);
      if (L.first == 0 && i + shift < C) {
        dG[i] += core.dot_reader(i + shift, d_bq + (i + shift) * Kp);
      }
    }
    for (size_t i = 0; i < WC; ++i) dG[i % C] -= core.dot_writer(i, d_w + i * Kp);
    for (size_t c = 0; c < Kp; ++c) dG[C - 1] += d_end[c];
    for (size_t i = C - 1; i > 0; --i) dG[i - 1] += dG[i];
    for (size_t i = 0; i < count; ++i) dg[(t + i) * x.HV + hv] = dG[i];
  }

  static void subtract_product(size_t width, const T* x, const T* y, T* z) {
    const Tag<T> d;
    for (size_t j = 0; j < width; j += hn::Lanes(d)) {
      hn::Store(hn::NegMulAdd(hn::Load(d, x + j), hn::Load(d, y + j), hn::Load(d, z + j)), d,
                z + j);
    }
  }

 public:
  CoreType core;
  T* values;  // [panels][W C][PW] what the chunk wrote

 protected:
  T* xdo;                                 // [panels][2C][PW] X and dO
  T *valuesT = nullptr, *xdoT = nullptr;  // [V][W C]; [V][2C]
  T* d_v = nullptr;      // [panels][C][PW] separate form: gradient of V (else it is X)
  T* rests = nullptr;    // [panels][C][PW] values without beta
  T* d_betas = nullptr;  // [panels][C][PW] gradient of beta per value channel
  T* d_beta = nullptr;   // [panels][C] its sum over a panel
  T* dZ;                 // [2C][W C]
  T *readT, *writeT;     // [Kp][2C]: S0 (X, dO)^T; [Kp][W C]: dS1 values^T
  T *d_bq, *d_w;         // [2C][Kp], [W C][Kp]
  T *d_end, *dG;         // [Kp], [C] or [C][Kp]
  T *sum_bq, *sum_w;     // d_bq, d_w over the value heads of the group
  T* tmp;                // [C][Kp]
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
