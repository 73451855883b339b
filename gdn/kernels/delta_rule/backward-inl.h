// SPDX-License-Identifier: Apache-2.0
// The chunk form backward for one key head of one sequence with all its value heads, chunks from
// last to first. Include inside the foreach_target pattern.
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

template <typename T>
struct Backward {
  Backward(const DeltaRuleParams& params, Carver& carve) : core(params, carve) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, W = L.W;
    per_segment = delta_rule::kSegment / C;
    states = carve.take<T>(L.group * per_segment * L.state_size());
    d_state = carve.take<T>(L.group * L.state_size());
    values = carve.take<T>(L.panels * W * C * PW);
    valuesT = carve.take<T>(PW * W * C);
    d_values = carve.take<T>(L.panels * W * C * PW);
    xdo = carve.take<T>(L.panels * 2 * C * PW);
    xdoT = carve.take<T>(PW * 2 * C);
    if (core.x.beta != nullptr) rests = carve.take<T>(L.panels * C * PW);
    if (core.x.beta != nullptr) d_betas = carve.take<T>(L.panels * C * PW);
    dZ = carve.take<T>(2 * C * W * C);
    readT = carve.take<T>(Kp * 2 * C);
    writeT = carve.take<T>(Kp * W * C);
    d_bq = carve.take<T>(2 * C * Kp);
    d_w = carve.take<T>(W * C * Kp);
    d_end = carve.take<T>(Kp);
    dG = carve.take<T>(L.channel ? C * Kp : C);
    d_beta = carve.take<T>(C);
    sum_bq = carve.take<T>(2 * C * Kp);
    sum_w = carve.take<T>(W * C * Kp);
    tmp = carve.take<T>(C * Kp);
  }

  void run(const void* saved, const DeltaRuleGrads& grads, int64_t n, int64_t h,
           int64_t saved_offset) {
    const auto& x = core.x;
    const auto& L = core.L;
    const int64_t C = L.C, group = L.group, size = x.K * x.V;
    const auto range = delta_rule::sequence_range(x, n);
    const int64_t tokens = range.end - range.begin;
    constexpr int64_t segment = delta_rule::kSegment;
    core.clear();
    begin_ = range.begin;
    for (int64_t i = 0; i < group; ++i) {
      const T* last = static_cast<const T*>(grads.d_final_state);
      const int64_t task = n * x.HV + h * group + i;
      core.load_state(last != nullptr ? last + task * size : nullptr, d_state + i * L.state_size());
    }
    const int64_t segments = (tokens + segment - 1) / segment;
    for (int64_t s = segments - 1; s >= 0; --s) {
      const int64_t begin = range.begin + s * segment, end = std::min(begin + segment, range.end);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t hv = h * group + i;
        const T* start = static_cast<const T*>(x.initial_state);
        if (start != nullptr) start += (n * x.HV + hv) * size;
        if (s > 0) {
          start =
              static_cast<const T*>(saved) + saved_offset + (hv * (segments - 1) + s - 1) * size;
        }
        recompute_states(start, static_cast<const T*>(saved), grads, begin, end, h, i);
      }
      for (int64_t c = (end - begin - 1) / C; c >= 0; --c) {
        chunk(static_cast<const T*>(saved), grads, begin + c * C, std::min(C, end - begin - c * C),
              h, c);
      }
    }
    if (grads.d_initial_state != nullptr) {
      for (int64_t i = 0; i < group; ++i) {
        core.store_state(d_state + i * L.state_size(), static_cast<T*>(grads.d_initial_state) +
                                                           (n * x.HV + h * group + i) * size);
      }
    }
  }

  T* state(int64_t i, int64_t c) { return states + (i * per_segment + c) * core.L.state_size(); }

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

  void recompute_states(const T* start, const T* saved, const DeltaRuleGrads& grads, int64_t begin,
                        int64_t end, int64_t h, int64_t i) {
    const auto& L = core.L;
    const int64_t hv = h * L.group + i;
    core.load_state(start, state(i, 0));
    int64_t c = 0;
    for (int64_t t = begin; t + static_cast<int64_t>(L.C) < end; t += L.C, ++c) {
      const int64_t next = t + L.C, left = end - next;
      if (left > static_cast<int64_t>(L.C)) {
        expect_recompute(saved, next, L.C, hv);
      } else {
        expect(saved, grads, next, left, hv);
      }
      core.load_keys(t, L.C, h, /*readers=*/false);
      core.load_gate(t, L.C, hv);
      load_written(saved, t, L.C, hv);
      for (size_t p = 0; p < L.panels; ++p) {
        core.advance_state(p, values + p * L.W * L.C * L.PW, state(i, c) + p * L.Kp * L.PW,
                           state(i, c + 1) + p * L.Kp * L.PW);
      }
    }
  }

  void chunk(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t h,
             int64_t c) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t half = L.C * L.Kp;
    core.load_keys(t, count, h);
    std::fill_n(sum_bq, 2 * half, T(0));
    std::fill_n(sum_w, L.W * half, T(0));
    for (size_t i = 0; i < L.group; ++i) {
      head(saved, grads, t, count, h * L.group + i, state(i, c), d_state + i * L.state_size());
    }
    if (x.erase == DeltaErase::kKey) add_scaled(half, sum_bq, T(1), sum_w);
    if (x.l2norm_qk) {
      norm_grads(count, core.bq + half, core.q_norm, sum_bq + half);
      norm_grads(count, core.key_rows(), core.k_norm, sum_w + (L.W - 1) * half);
    }
    store_keys(grads.dq, t, count, h, sum_bq + half);
    if (delta_rule::has_a(x.erase)) store_keys(grads.da, t, count, h, sum_bq);
    if (x.erase == DeltaErase::kSeparate) store_keys(grads.dp, t, count, h, sum_w);
    store_keys(grads.dk, t, count, h, sum_w + (L.W - 1) * half);
  }

  // From the gradient of normalised rows y to that of the rows themselves.
  void norm_grads(size_t count, const T* y, const T* factors, T* dy) const {
    const size_t Kp = core.L.Kp;
    for (size_t i = 0; i < count; ++i) {
      T* g = dy + i * Kp;
      add_scaled(Kp, y + i * Kp, -dot(Kp, y + i * Kp, g), g);
      scale_rows<T>(1, Kp, g, nullptr, false, factors + i, g);
    }
  }

  void store_keys(void* dst, int64_t t, size_t count, int64_t h, const T* src) const {
    const auto& x = core.x;
    for (size_t i = 0; i < count; ++i) {
      store_row(x.dtype, dst, ((t + i) * x.H + h) * x.K, x.K, src + i * core.L.Kp);
    }
  }

  void head(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t hv,
            const T* s, T* ds) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp;
    core.load_gate(t, count, hv);
    core.decay_readers();
    core.scores();
    std::fill_n(dZ, 2 * C * L.W * C, T(0));
    std::fill_n(readT, Kp * 2 * C, T(0));
    std::fill_n(writeT, Kp * L.W * C, T(0));
    std::fill_n(d_end, Kp, T(0));
    std::fill_n(d_beta, C, T(0));
    if (t > begin_) {
      expect(saved, grads, t - C, C, hv);
    } else if (hv + 1 < x.HV) {
      expect_recompute(saved, begin_, count, hv + 1);
    }
    load_written(saved, t, count, hv);
    T* d_out = xdo + C * L.PW;
    if (grads.d_o != nullptr) {
      core.load_values(x.dtype, grads.d_o, t, count, hv, d_out, 2 * C * L.PW);
    } else {
      for (size_t p = 0; p < L.panels; ++p) std::fill_n(d_out + p * 2 * C * L.PW, C * L.PW, T(0));
    }
    for (size_t p = 0; p < L.panels; ++p) {
      panel(p, s + p * Kp * L.PW, ds + p * Kp * L.PW);
    }
    core.store_values(x.dtype, grads.dv, t, count, hv, d_values + (L.W - 1) * C * L.PW,
                      L.W * C * L.PW);
    key_grads();
    gate_grads(grads, t, count, hv);
    add_scaled((2 * C - L.first) * Kp, d_bq + L.first * Kp, T(1), sum_bq + L.first * Kp);
    add_scaled(L.W * C * Kp, d_w, T(1), sum_w);
  }

  // What the chunk of n tokens from t, the one before this in the sequence, will touch.
  void expect(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t n, int64_t hv) {
    const auto& x = core.x;
    const int64_t h = hv / core.L.group;
    core.ahead.clear();
    for (const void* keys : {x.q, x.k, x.a, x.p}) core.expect_keys(keys, t, n, h);
    for (const void* keys : {grads.dq, grads.dk, grads.da, grads.dp})
      core.expect_keys(keys, t, n, h);
    core.expect_values(x.dtype, grads.d_o, t, n, hv);
    core.expect_values(x.dtype, grads.dv, t, n, hv);
    expect_written(saved, t, n, hv);
    const auto& L = core.L;
    core.ahead.spread(
        std::max<size_t>(1, L.panels * L.Kp * (2 + 3 * L.W * L.C / L.PW) / kTileRows));
  }

  // What recomputing the state after the chunk of n tokens from t will touch.
  void expect_recompute(const T* saved, int64_t t, size_t n, int64_t hv) {
    const auto& x = core.x;
    core.ahead.clear();
    for (const void* keys : {x.k, x.p}) core.expect_keys(keys, t, n, hv / core.L.group);
    expect_written(saved, t, n, hv);
    core.ahead.spread(core.L.panels * core.L.Kp / kTileRows);
  }
  void expect_written(const T* saved, int64_t t, size_t n, int64_t hv) {
    const auto& x = core.x;
    const bool reads_v = x.erase == DeltaErase::kNone || x.erase == DeltaErase::kSeparate;
    if (reads_v) core.expect_values(x.dtype, x.v, t, n, hv);
    if (x.erase != DeltaErase::kNone) core.expect_values(kDTypeOf<T>, saved, t, n, hv);
  }

  // Everything that goes over the columns of V; ds becomes the gradient of the state at the chunk's
  // start.
  void panel(size_t p, const T* s, T* ds) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, WC = L.W * C, columns = L.columns(p);
    T *x_do = xdo + p * 2 * C * PW, *d_out = x_do + C * PW, *d_value = d_values + p * WC * PW;
    const T* value = values + p * WC * PW;

    gemm<Into::kSet, false>(WC, columns, Kp, core.wEh, Kp, ds, PW, d_value, PW);
    for (size_t half = 0; half < L.W; ++half) {
      gemm_lower_transposed(C, columns, core.Z + C * WC + half * C, WC, d_out, PW,
                            d_value + half * C * PW, PW);
    }
    const bool has_beta = core.x.beta != nullptr;
    T* d_beta = has_beta ? d_betas + p * C * PW : nullptr;  // first the gradient of U itself
    if (L.first == 0) {
      core.with_beta(p, [&](auto factors) HWY_ATTR {
        solve_lower_transposed(C, columns, core.Z, WC, factors, d_value, PW, d_beta);
      });
      std::copy_n(d_value, C * PW, x_do);
    } else if (has_beta) {
      std::copy_n(d_value, C * PW, d_beta);
      core.times_beta(p, d_value, d_value);
    }
    if (has_beta) beta_grads(columns, rests + p * C * PW, d_beta);
    if (core.x.erase == DeltaErase::kSeparate) {
      gemm_lower_transposed(C, columns, core.Z + C, WC, x_do, PW, d_value + C * PW, PW);
    }

    transpose(WC, columns, value, PW, valuesT, WC);
    transpose(2 * C - L.first, columns, x_do + L.first * PW, PW, xdoT + L.first, 2 * C);
    gemm<Into::kAdd, false>(2 * C - L.first, WC, columns, x_do + L.first * PW, PW, valuesT, WC,
                            dZ + L.first * WC, WC);
    gemm<Into::kAdd, false>(Kp, WC, columns, ds, PW, valuesT, WC, writeT, WC,
                            [this]() HWY_ATTR { core.ahead.some_rows(); });
    gemm<Into::kAdd, false>(Kp, 2 * C - L.first, columns, s, PW, xdoT + L.first, 2 * C,
                            readT + L.first, 2 * C, [this]() HWY_ATTR { core.ahead.some_rows(); });

    const Tag<T> d;
    const T* end = core.end_decay();
    auto total = hn::Zero(d);
    for (size_t i = 0; i < Kp; ++i) {
      const auto f = hn::Set(d, end[L.channel ? i : 0]);
      auto sum = hn::Zero(d);
      for (size_t j = 0; j < columns; j += hn::Lanes(d)) {
        const auto g = hn::Mul(f, hn::Load(d, ds + i * PW + j));
        sum = hn::MulAdd(g, hn::Load(d, s + i * PW + j), sum);
        hn::Store(g, d, ds + i * PW + j);
      }
      if (L.channel) {
        d_end[i] += hn::GetLane(hn::SumOfLanes(d, sum));
      } else {
        total = hn::Add(total, sum);
      }
    }
    if (!L.channel) d_end[0] += hn::GetLane(hn::SumOfLanes(d, total));
    gemm<Into::kAdd, true>(Kp, columns, 2 * C - L.first, core.bqE + L.first * Kp, Kp,
                           x_do + L.first * PW, PW, ds, PW,
                           [this]() HWY_ATTR { core.ahead.some_rows(); });
  }

  // From U without beta, and the gradient of U, one panel: beta's gradient in place of the latter.
  void beta_grads(size_t columns, const T* rest, T* d_u) {
    const size_t PW = core.L.PW;
    const Tag<T> d;
    for (size_t i = 0; i < core.L.C; ++i) {
      auto sum = hn::Zero(d);
      for (size_t j = i * PW; j < i * PW + columns; j += hn::Lanes(d)) {
        const auto product = hn::Mul(hn::Load(d, rest + j), hn::Load(d, d_u + j));
        hn::Store(product, d, d_u + j);
        sum = hn::Add(sum, product);
      }
      d_beta[i] += hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }

  // d_bq and d_w from what the panels left in dZ, readT and writeT.
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
      for (size_t j = 0; j < C; ++j)
        add_product(Kp, core.w + (half * C + j) * Kp, dw + j * Kp, d_end);
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
    if (r > 0) {
      core.decay_sub_block(r, core.bq, ws);
      const T* sub_q = core.sub_bq + kSub * Kp;
      if (L.first == 0) {
        gemm<Into::kSet, false>(kSub, Kp, r, dz + r * ld, ld, core.sub_w, Kp, tmp, Kp);
        add_decayed_rows(r, L.old_state, tmp, d_bq + r * Kp);
      }
      gemm<Into::kSet, false>(kSub, Kp, r, query_dz + r * ld, ld, core.sub_w, Kp, tmp, Kp);
      add_decayed_rows(r, false, tmp, d_bq + (C + r) * Kp);
      gemm<Into::kSet, true>(r, Kp, kSub, query_dz + r * ld, ld, sub_q, Kp, tmp, Kp);
      if (L.first == 0)
        gemm<Into::kAdd, true>(r, Kp, kSub, dz + r * ld, ld, core.sub_bq, Kp, tmp, Kp);
      for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
        auto decay = hn::Set(d, T(1));
        for (size_t j = r; j-- > 0;) {
          const auto sum =
              hn::MulAdd(decay, hn::Load(d, tmp + j * Kp + c), hn::Load(d, dw + j * Kp + c));
          hn::Store(sum, d, dw + j * Kp + c);
          decay = hn::Mul(decay, hn::Load(d, core.e + j * Kp + c));
        }
      }
    }
    for (size_t c = 0; c < Kp; c += hn::Lanes(d)) {
      for (size_t j = r; j < r + kSub; ++j) diagonal_grads(j, r + kSub, c, ws, dz, dw);
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
        static_cast<T*>(grads.dbeta)[(t + i) * x.HV + hv] = d_beta[i];
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
      dG[i] = dot(Kp, core.bq + (C + i) * Kp, d_bq + (C + i) * Kp);
      if (L.first == 0 && i + shift < C) {
        dG[i] += dot(Kp, core.bq + (i + shift) * Kp, d_bq + (i + shift) * Kp);
      }
    }
    for (size_t i = 0; i < WC; ++i) dG[i % C] -= dot(Kp, core.w + i * Kp, d_w + i * Kp);
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

  Core<T> core;
  int64_t begin_ = 0;      // first token of the sequence
  int64_t per_segment;     // chunks per segment
  T *states, *d_state;     // [group][per_segment] states of a segment; [group]
  T *values, *valuesT;     // [W C][PW], [PW][W C]: what the chunk wrote
  T* d_values;             // [W C][PW]
  T *xdo, *xdoT;           // [2C][PW]: X and dO, [PW][2C]
  T* rests = nullptr;      // [C][PW] values without beta
  T* d_betas = nullptr;    // [C][PW] gradient of beta per value channel
  T* dZ;                   // [2C][W C]
  T *readT, *writeT;       // [Kp][2C]: S0 (X, dO)^T; [Kp][W C]: dS1 values^T
  T *d_bq, *d_w;           // [2C][Kp], [W C][Kp]
  T *d_end, *dG, *d_beta;  // [Kp], [C] or [C][Kp], [C]
  T *sum_bq, *sum_w;       // d_bq, d_w over the value heads of the group
  T* tmp;                  // [C][Kp]
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
