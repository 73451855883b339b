// SPDX-License-Identifier: Apache-2.0
// One chunk of one key head with its value heads backward, with bf16 products: a drop-in for
// ChunkBackward, from which it takes what is no product. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_PAIR_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_PAIR_BACKWARD_INL_H_
#undef GDN_KERNELS_DELTA_RULE_PAIR_BACKWARD_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_PAIR_BACKWARD_INL_H_
#endif

#include "gdn/kernels/delta_rule/backward-inl.h"
#include "gdn/kernels/delta_rule/pair_core-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

struct PairBackward : ChunkBackward<float, PairCore> {
  using Base = ChunkBackward<float, PairCore>;
  struct Scope : PairCore::Scope {
    explicit Scope(const PairBackward& chunk) : PairCore::Scope(chunk.core.kernels) {}
  };
  static Layout<float> layout(const DeltaRuleParams& x) { return PairCore::layout(x); }

  PairBackward(const DeltaRuleParams& params, Carver& carve, bool shared = false)
      : Base(params, carve), buffers(shared ? core.L.panels : 1) {
    const auto& L = core.L;
    const size_t Vp = L.panels * L.PW;
    readersT = carve.take<BFloat16>(L.Kp * 2 * L.C);
    state_pairs = carve.take<uint32_t>(buffers * L.Kp / 2 * L.PW);
    token_pairs = carve.take<uint32_t>(buffers * L.C * L.PW);
    value_rows = carve.take<BFloat16>(L.C * Vp);
    xdo_rows = carve.take<BFloat16>(2 * L.C * Vp);
    state_rows = carve.take<BFloat16>(32 * Vp);
    values_pairs = carve.take<uint32_t>(Vp / 2 * L.C);
    xdo_pairs = carve.take<uint32_t>(Vp / 2 * 2 * L.C);
  }

  void prepare(const float* saved, const DeltaRuleGrads& grads, int64_t t, size_t count,
               int64_t hv) {
    const auto& L = core.L;
    const size_t C = L.C, first = L.first;
    Base::prepare(saved, grads, t, count, hv);
    for (size_t half = first; half < 2 * C; half += C) {
      core.transpose_rows(C, C, core.rounded_Z + half * C, C, core.scoresT + half * C, C);
    }
    core.transpose_rows(2 * C - first, L.Kp, core.readers + first * L.Kp, L.Kp, readersT + first,
                        2 * C);
  }

  void advance(size_t p, const float* state, float* next) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, n = L.valid(p);
    uint32_t* written = tokens_of(p);
    core.kernels.pack({C, n, values + p * C * PW, PW, core.write}, written, PW);
    std::copy_n(state, L.Kp * PW, next);
    core.multiply({L.Kp, n, C, core.writersT, C, written, PW, next, PW, core.end_decay(),
                   L.channel ? size_t{1} : 0});
  }

  // See Base.
  void retreat_values(size_t p, const float* ds) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, n = L.valid(p);
    float *X = xdo + p * 2 * C * PW, *d_out = X + C * PW;
    uint32_t *end = state_pairs + p % buffers * Kp / 2 * PW, *tokens = tokens_of(p);
    core.kernels.pack({Kp, n, ds, PW}, end, PW);
    core.kernels.pack({C, n, d_out, PW}, tokens, PW);
    core.multiply({C, n, Kp, core.writers, Kp, end, PW, X, PW});
    core.multiply({C, n, C, core.scoresT + C * C, C, tokens, PW, X, PW, core.write, 1});
    const bool has_beta = core.x.beta != nullptr;
    float* d_u = has_beta ? d_betas + p * C * PW : nullptr;
    if (L.first == 0) {
      for (size_t r = C; r > 0; r -= kSub) solve(p, r - kSub, X, d_u, tokens);
    } else if (has_beta) {
      std::copy_n(X, C * PW, d_u);
      core.times_beta(p, X, X);
    }
    if (has_beta) beta_grads(n, rests + p * C * PW, d_u, d_beta + p * C);
  }

  void retreat_state(size_t p, const float* ds, float* next) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, n = L.valid(p), first = L.first, reads = 2 * C - first;
    uint32_t* tokens = tokens_of(p);
    core.kernels.pack({reads, n, xdo + (p * 2 * C + first) * PW, PW, core.read + first}, tokens,
                      PW);
    if (next != ds) std::copy_n(ds, L.Kp * PW, next);
    core.multiply({L.Kp, n, reads, readersT + first, 2 * C, tokens, PW, next, PW, core.end_decay(),
                   L.channel ? size_t{1} : 0});
  }

  void key_products(const float* s, const float* ds) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, first = L.first, reads = 2 * C - first;
    const size_t Vp = L.panels * PW, rows = core.product_rows();
    round_panels(C, values, C * PW, value_rows);
    round_panels(reads, xdo + first * PW, 2 * C * PW, xdo_rows + first * Vp);
    transpose_to_pairs(C, Vp, value_rows, Vp, values_pairs, C);
    transpose_to_pairs(reads, Vp, xdo_rows + first * Vp, Vp, xdo_pairs + first, 2 * C);
    for (size_t half = first; half < 2 * C; half += C) {
      for (size_t r = 0; r < C; r += rows) {
        core.kernels.product({rows, r + rows, Vp, xdo_rows + (half + r) * Vp, Vp, values_pairs, C,
                              dZ + (half + r) * C, C});
      }
    }
    for (size_t i = 0; i < Kp; i += 32) {
      round_panels(32, ds + i * PW, Kp * PW, state_rows);
      core.multiply({32, C, Vp, state_rows, Vp, values_pairs, C, writeT + i * C, C});
      round_panels(32, s + i * PW, Kp * PW, state_rows);
      core.multiply({32, reads, Vp, state_rows, Vp, xdo_pairs + first, 2 * C,
                     readT + i * 2 * C + first, 2 * C});
    }
    end_gradient(s, ds);
  }

  size_t pauses() const {
    const auto& L = core.L;
    return (L.panels * (2 * L.C + L.Kp) + 2 * L.Kp) / core.product_rows();
  }
  size_t advance_pauses() const { return core.L.panels * core.L.Kp / core.product_rows(); }

 private:
  uint32_t* tokens_of(size_t p) const { return token_pairs + p % buffers * core.L.C * core.L.PW; }

  // Rows [r, r + kSub) of X: what they get from the rows after as a product, from each other in
  // fp32.
  void solve(size_t p, size_t r, float* X, float* d_u, uint32_t* tokens) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, n = L.valid(p), from = (r + kSub) / 32 * 32;
    float *rows = X + r * PW, *raw = d_u != nullptr ? d_u + r * PW : nullptr;
    if (r + kSub < C) {
      core.kernels.product({kSub, n, C - from, core.scoresT + r * C + from, C,
                            tokens + from / 2 * PW, PW, rows, PW, &kOne, 0});
    }
    core.with_beta(p, [&](auto factors) HWY_ATTR {
      const size_t width = panel_width<float>();
      for (size_t j = 0; j < n; j += width) {
        solve_lower_transposed(kSub, std::min(width, n - j), core.Z + r * C + r, C,
                               factors.from(r, j), rows + j, PW, raw != nullptr ? raw + j : raw);
      }
    });
    core.kernels.pack({kSub, n, rows, PW}, tokens + r / 2 * PW, PW);
    // The depth of products is a multiple of 32: the rows to come count as 0 until they are there.
    if (r % 32 != 0) std::fill_n(tokens + (r - kSub) / 2 * PW, kSub / 2 * PW, 0u);
  }

  // dst[rows][panels PW] = rows of panels, `step` apart, as bf16; zero past V.
  void round_panels(size_t rows, const float* src, size_t step, BFloat16* dst) const {
    const auto& L = core.L;
    const size_t Vp = L.panels * L.PW;
    for (size_t p = 0; p < L.panels; ++p) {
      core.kernels.round({rows, L.valid(p), src + p * step, L.PW}, dst + p * L.PW, Vp);
    }
    for (size_t i = 0; i < rows && Vp > L.V; ++i) {
      std::fill(dst + i * Vp + L.V, dst + (i + 1) * Vp, BFloat16{0});
    }
  }

  BFloat16* readersT;     // [Kp][2C]
  size_t buffers;         // of the following two
  uint32_t* state_pairs;  // [Kp/2][PW] a panel of the gradient of the state at the chunk's end
  uint32_t* token_pairs;  // [2C/2][PW] a panel of dO, of X, of both, or of U
  BFloat16 *value_rows, *xdo_rows;     // [C][V], [2C][V]
  BFloat16* state_rows;                // [32][V] some rows of a state or its gradient
  uint32_t *values_pairs, *xdo_pairs;  // [V/2][C], [V/2][2C] transposed
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
