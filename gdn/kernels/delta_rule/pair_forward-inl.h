// SPDX-License-Identifier: Apache-2.0
// One chunk of one value head forward, with bf16 products: a drop-in for ChunkForward.
// Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_PAIR_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_PAIR_FORWARD_INL_H_
#undef GDN_KERNELS_DELTA_RULE_PAIR_FORWARD_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_PAIR_FORWARD_INL_H_
#endif

#include "gdn/kernels/delta_rule/pair_core-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

struct PairForward {
  using T = float;
  struct Scope : PairCore::Scope {
    explicit Scope(const PairForward& chunk) : PairCore::Scope(chunk.core.kernels) {}
  };
  static Layout<float> layout(const DeltaRuleParams& x) { return PairCore::layout(x); }

  PairForward(const DeltaRuleParams& params, Carver& carve) : core(params, carve) {
    const auto& L = core.L;
    outputs = carve.take<float>(L.panels * L.C * L.PW);
    values = carve.take<float>(L.panels * L.C * L.PW);
    if (params.beta != nullptr) rests = carve.take<float>(L.panels * L.C * L.PW);
    state_pairs = carve.take<uint32_t>(L.Kp / 2 * L.PW);
    value_pairs = carve.take<uint32_t>(L.C / 2 * L.PW);
    end_pairs = carve.take<uint32_t>(L.C / 2 * L.PW);
  }

  void prepare(int64_t t, size_t count, int64_t hv) {
    begin = t;
    tokens = count;
    head = hv;
    core.load_keys(t, count, hv / core.L.group);
    core.load_gate(t, count, hv);
    core.decay_readers();
    core.scores();
    core.load_betas(t, count, hv);
  }

  // Panel p of the values: from V to U, and of the outputs. The state s moves on to the end of the
  // chunk with `advance`.
  void panel(size_t p, bool advance, float* s) {
    const auto& L = core.L;
    const auto& kernels = core.kernels;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, n = L.valid(p);
    float *value = values + p * C * PW, *output = outputs + p * C * PW;
    kernels.pack({Kp, n, s, PW}, state_pairs, PW);
    if (L.first == 0) core.multiply({C, n, Kp, core.readers, Kp, state_pairs, PW, value, PW});
    core.multiply({C, n, Kp, core.readers + C * Kp, Kp, state_pairs, PW, output, PW});
    for (size_t r = 0; r < C; r += kSub) solve(p, r, value);
    for (size_t r = 0; r < C; r += 32) {
      core.multiply({32, n, r + 32, core.rounded_Z + (C + r) * C, C, value_pairs, PW,
                     output + r * PW, PW, core.read + C + r, 1});
    }
    if (!advance) return;
    kernels.pack({C, n, value, PW, core.write}, end_pairs, PW);
    core.multiply({Kp, n, C, core.writersT, C, end_pairs, PW, s, PW, core.end_decay(),
                   L.channel ? size_t{1} : 0});
  }

  void store(const DeltaRuleOutputs& out, int64_t t, size_t count, int64_t hv) const {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t half = L.C * L.PW;
    BFloat16* o = static_cast<BFloat16*>(out.o) + (t * x.HV + hv) * x.V + core.column;
    for (size_t p = 0; p < L.panels; ++p) {
      core.kernels.round({count, L.valid(p), outputs + p * half, L.PW}, o + p * L.PW, x.HV * x.V);
    }
    if (out.saved == nullptr || x.erase == DeltaErase::kNone) return;
    core.store_values(DType::kF32, out.saved, t, count, hv, rests != nullptr ? rests : values,
                      half);
  }

  // What the next chunk, of n tokens from t, will touch.
  void expect(const DeltaRuleOutputs& out, int64_t t, int64_t n, int64_t hv) {
    const auto& x = core.x;
    const auto& L = core.L;
    for (const void* keys : {x.q, x.k, x.a}) core.expect_keys(keys, t, n, hv / L.group);
    core.expect_values(x.dtype, x.v, t, n, hv);
    core.expect_values(x.dtype, out.o, t, n, hv);
    if (x.erase != DeltaErase::kNone) core.expect_values(DType::kF32, out.saved, t, n, hv);
    core.ahead.spread(L.panels * (3 * L.C - L.first + L.Kp) / core.product_rows());
  }

  PairCore core;

 private:
  // Rows [r, r + kSub) of U: what they get from the rows before as a product, from each other in
  // fp32.
  void solve(size_t p, size_t r, float* value) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, n = L.valid(p);
    const bool erases = L.first == 0;
    float* rows = value + r * PW;
    add_values(p, r, rows);
    if (erases && r > 0) {
      core.kernels.product({kSub, n, (r + 31) / 32 * 32, core.rounded_Z + r * C, C, value_pairs, PW,
                            rows, PW, &kOne, 0});
    }
    float* rest = rests != nullptr ? rests + (p * C + r) * PW : nullptr;
    core.with_beta(p, [&](auto factors) HWY_ATTR {
      const size_t width = panel_width<float>();
      for (size_t j = 0; j < n && erases; j += width) {
        solve_lower(kSub, std::min(width, n - j), core.Z + r * C + r, C, factors.from(r, j),
                    rows + j, PW, rest != nullptr ? rest + j : nullptr);
      }
      const hn::ScalableTag<float> d;
      for (size_t i = 0; i < kSub && !erases; ++i) {
        for (size_t j = 0; j < n; j += hn::Lanes(d)) {
          float* at = rows + i * PW + j;
          hn::Store(hn::Mul(factors.at(r + i, j), hn::Load(d, at)), d, at);
        }
      }
    });
    uint32_t* to = value_pairs + r / 2 * PW;
    core.kernels.pack({kSub, n, rows, PW}, to, PW);
    // The depth of products is a multiple of 32: the rows to come count as 0 until they are there.
    if (r % 32 == 0) std::fill_n(to + kSub / 2 * PW, kSub / 2 * PW, 0u);
  }

  // Rows [r, r + kSub) of panel p: x = v + factors * x, or v where nothing is read.
  void add_values(size_t p, size_t r, float* x) const {
    const auto& L = core.L;
    const auto& params = core.x;
    const hn::ScalableTag<float> d;
    const size_t n = L.valid(p);
    const BFloat16* v =
        static_cast<const BFloat16*>(params.v) + head * params.V + core.column + p * L.PW;
    for (size_t i = 0; i < kSub; ++i, x += L.PW) {
      const bool valid = r + i < tokens;
      const BFloat16* row = v + (valid ? (begin + r + i) * params.HV * params.V : 0);
      const auto f = hn::Set(d, core.read[r + i]);
      for (size_t j = 0; j < n; j += hn::Lanes(d)) {
        auto value = valid ? load_as(d, row + j) : hn::Zero(d);
        if (L.first == 0) value = hn::MulAdd(f, hn::Load(d, x + j), value);
        hn::Store(value, d, x + j);
      }
    }
  }

  int64_t begin = 0, head = 0;  // of the chunk
  size_t tokens = 0;
  float *outputs, *values;            // [panels][C][PW]
  float* rests = nullptr;             // [panels][C][PW] values without beta
  uint32_t* state_pairs;              // [Kp/2][PW] a panel of the state at the chunk's start
  uint32_t *value_pairs, *end_pairs;  // [C/2][PW] a panel of U; and decayed to the chunk's end
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
