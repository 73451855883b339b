// SPDX-License-Identifier: Apache-2.0
// The chunk form forward. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#undef GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#endif

#include <vector>

#include "gdn/kernels/delta_rule/core-inl.h"
#include "gdn/kernels/delta_rule/plan.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// One chunk of one value head: prepare; panel for each panel; store.
template <typename T_>
struct ChunkForward {
  using T = T_;
  struct Scope {  // of a thread that works on chunks
    explicit Scope(const ChunkForward&) {}
  };
  static Layout<T> layout(const DeltaRuleParams& params) { return Layout<T>(params); }

  ChunkForward(const DeltaRuleParams& params, Carver& carve) : core(params, carve) {
    const auto& L = core.L;
    outputs = carve.take<T>(L.panels * L.C * L.PW);
    values = carve.take<T>(L.panels * L.W * L.C * L.PW);
    if (params.beta != nullptr) rests = carve.take<T>(L.panels * L.C * L.PW);
  }

  void prepare(int64_t t, size_t count, int64_t hv) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t half = L.C * L.PW;
    core.load_keys(t, count, hv / L.group);
    core.load_gate(t, count, hv);
    core.decay_readers();
    core.scores();
    core.load_values(x.dtype, x.v, t, count, hv, values + (L.W - 1) * half, L.W * half);
    core.load_betas(t, count, hv);
  }

  // Panel p of the values: from V to U (and V behind it in the separate form), and of the outputs.
  // The state s moves on to the end of the chunk with `advance`.
  void panel(size_t p, bool advance, T* s) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, columns = L.columns(p), ld = L.W * C;
    const auto between = [this]() HWY_ATTR { core.ahead.some_lines(); };
    const Depth depth{Kp / blocks(), blocks(), Kp / blocks(), Kp / blocks() * PW};
    T *value = values + p * L.W * C * PW, *output = outputs + p * C * PW;
    if (core.x.erase == DeltaErase::kSeparate) {
      gemm<false>(FromTriangle<T, false>{core.Z + C, ld, value + C * PW, PW, C}, C, columns, depth,
                  core.bqE, Kp, s, PW, value, PW, between);
    } else if (L.first == 0) {
      gemm<false>(FromMatrix<T>{value, PW}, C, columns, depth, core.bqE, Kp, s, PW, value, PW,
                  between);
    }
    T* rest = core.x.beta != nullptr ? rests + p * C * PW : nullptr;
    if (L.first == 0) {
      core.with_beta(p, [&](auto factors) HWY_ATTR {
        solve_lower(C, columns, core.Z, ld, factors, value, PW, rest);
      });
    } else if (core.x.beta != nullptr) {
      core.times_beta(p, value, value);
    }
    gemm<false>(FromTriangle<T, false>{core.Z + C * ld, ld, value, PW, C}, C, columns, depth,
                core.bqE + C * Kp, Kp, s, PW, output, PW, between);
    if (core.x.erase == DeltaErase::kSeparate) {
      gemm_lower(C, columns, core.Z + C * ld + C, ld, value + C * PW, PW, output, PW);
    }
    if (advance) core.advance_state(p, value, s, s);
  }

  void store(const DeltaRuleOutputs& out, int64_t t, size_t count, int64_t hv) const {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t half = L.C * L.PW;
    core.store_values(x.dtype, out.o, t, count, hv, outputs, half);
    if (out.saved == nullptr || x.erase == DeltaErase::kNone) return;
    if (x.beta != nullptr) {
      core.store_values(kDTypeOf<T>, out.saved, t, count, hv, rests, half);
    } else {
      core.store_values(kDTypeOf<T>, out.saved, t, count, hv, values, L.W * half);
    }
  }

  // What the next chunk, of n tokens from t, will touch.
  void expect(const DeltaRuleOutputs& out, int64_t t, int64_t n, int64_t hv) {
    const auto& x = core.x;
    const auto& L = core.L;
    for (const void* keys : {x.q, x.k, x.a, x.p}) core.expect_keys(keys, t, n, hv / L.group);
    core.expect_values(x.dtype, x.v, t, n, hv);
    core.expect_values(x.dtype, out.o, t, n, hv);
    if (x.erase != DeltaErase::kNone) core.expect_values(kDTypeOf<T>, out.saved, t, n, hv);
    core.ahead.spread(L.panels * ((2 * L.C - L.first) * blocks() + L.Kp * L.W * L.C / kSub) /
                      kTileRows);
  }

  // Pieces that the depth of the reads is cut into, for some prefetches between.
  size_t blocks() const { return core.L.Kp % 64 == 0 ? core.L.Kp / 32 : 1; }

  Core<T> core;
  T* outputs;          // [panels][C][PW]
  T* values;           // [panels][W C][PW]
  T* rests = nullptr;  // [panels][C][PW] values without beta
};

// One thread on some value heads of a sequence, or on some columns of their values.
template <typename Chunk>
struct Forward {
  using T = typename Chunk::T;
  Forward(const DeltaRuleParams& params, int64_t heads, Carver& carve) : ctx(params, carve) {
    states = carve.take<T>(heads * ctx.core.L.state_size());
  }

  // The task's heads go through the chunks together: their rows are neighbours in memory, so pages
  // are looked up once for all.
  void run(const DeltaRuleOutputs& out, const delta_rule::Task& task, int64_t saved_offset) {
    const int64_t n = task.n, h0 = task.h0, h1 = task.h1;
    auto& core = ctx.core;
    const auto& x = core.x;
    const auto& L = core.L;
    const typename Chunk::Scope scope(ctx);
    const int64_t C = L.C, size = x.K * x.V;
    const auto range = sequence_span(x, n);
    const int64_t segment = delta_rule::segment(x);
    const int64_t stored = delta_rule::saved_states(x, range.size());
    T* saved = static_cast<T*>(out.saved);
    core.use_values(task.v0, task.v1 - task.v0);
    core.clear();
    const T* initial = static_cast<const T*>(x.initial_state);
    for (int64_t h = h0; h < h1; ++h) {
      core.load_state(initial != nullptr ? initial + (n * x.HV + h) * size : nullptr,
                      state(h - h0));
    }
    for (int64_t t = range.begin; t < range.end; t += C) {
      const int64_t done = t - range.begin, left = range.end - t;
      for (int64_t h = h0; h < h1; ++h) {
        T* s = state(h - h0);
        if (saved != nullptr && done > 0 && done % segment == 0) {
          core.store_state(s, saved + saved_offset + (h * stored + done / segment - 1) * size);
        }
        core.ahead.clear();
        if (left > C) {
          ctx.expect(out, t + C, std::min(C, left - C), h);
        } else if (h + 1 < h1 && done == 0) {
          ctx.expect(out, t, left, h + 1);
        }
        const int64_t count = std::min(C, left);
        const bool advance = left > C || out.final_state != nullptr;
        ctx.prepare(t, count, h);
        for (size_t p = 0; p < L.panels; ++p) ctx.panel(p, advance, s + p * L.Kp * L.PW);
        ctx.store(out, t, count, h);
      }
    }
    if (out.final_state == nullptr) return;
    for (int64_t h = h0; h < h1; ++h) {
      core.store_state(state(h - h0), static_cast<T*>(out.final_state) + (n * x.HV + h) * size);
    }
  }

 private:
  T* state(int64_t i) const { return states + i * ctx.core.L.state_size(); }

  Chunk ctx;
  T* states;  // [heads][panels][Kp][PW]
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
