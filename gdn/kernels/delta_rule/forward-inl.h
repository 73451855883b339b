// SPDX-License-Identifier: Apache-2.0
// The chunk form forward for some value heads of one sequence. Include inside the foreach_target
// pattern.
#if defined(GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#undef GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_FORWARD_INL_H_
#endif

#include "gdn/kernels/delta_rule/core-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

template <typename T>
struct Forward {
  // `heads`: how many value heads a task may have.
  Forward(const DeltaRuleParams& params, int64_t heads, Carver& carve) : core(params, carve) {
    const auto& L = core.L;
    states = carve.take<T>(heads * L.state_size());
    outputs = carve.take<T>(L.panels * L.C * L.PW);
    values = carve.take<T>(L.panels * L.W * L.C * L.PW);
    if (params.beta != nullptr) rests = carve.take<T>(L.panels * L.C * L.PW);
  }

  // Value heads [hv0, hv1) of sequence n, panels [p0, p1) of their values. The heads go through the
  // chunks together: their rows are neighbours in memory, so pages are looked up once for all.
  void run(const DeltaRuleOutputs& out, int64_t n, int64_t hv0, int64_t hv1, size_t p0, size_t p1,
           int64_t saved_offset) {
    const auto& x = core.x;
    const int64_t C = core.L.C, size = x.K * x.V;
    const auto range = delta_rule::sequence_range(x, n);
    const int64_t segment = delta_rule::segment(x);
    const int64_t stored = delta_rule::saved_states(x, range.end - range.begin);
    T* saved_values = x.erase == DeltaErase::kNone ? nullptr : static_cast<T*>(out.saved);
    T* saved = static_cast<T*>(out.saved);
    core.p0 = p0;
    core.p1 = p1;
    core.clear();
    const T* initial = static_cast<const T*>(x.initial_state);
    for (int64_t hv = hv0; hv < hv1; ++hv) {
      core.load_state(initial != nullptr ? initial + (n * x.HV + hv) * size : nullptr,
                      state(hv - hv0));
    }
    for (int64_t t = range.begin; t < range.end; t += C) {
      const int64_t done = t - range.begin, left = range.end - t;
      for (int64_t hv = hv0; hv < hv1; ++hv) {
        if (saved != nullptr && done > 0 && done % segment == 0) {
          const int64_t index = hv * stored + done / segment - 1;
          core.store_state(state(hv - hv0), saved + saved_offset + index * size);
        }
        core.ahead.clear();
        if (left > C) {
          expect(out, saved_values, t + C, std::min(C, left - C), hv);
        } else if (hv + 1 < hv1 && done == 0) {
          expect(out, saved_values, t, left, hv + 1);
        }
        const bool last = left <= C && out.final_state == nullptr;
        chunk(out, saved_values, t, std::min(C, left), hv, state(hv - hv0), last);
      }
    }
    if (out.final_state == nullptr) return;
    for (int64_t hv = hv0; hv < hv1; ++hv) {
      core.store_state(state(hv - hv0), static_cast<T*>(out.final_state) + (n * x.HV + hv) * size);
    }
  }

 private:
  // Pieces that the depth of the reads is cut into, for some prefetches between.
  size_t blocks() const { return core.L.Kp % 64 == 0 ? core.L.Kp / 32 : 1; }
  T* state(int64_t i) const { return states + i * core.L.state_size(); }

  void chunk(const DeltaRuleOutputs& out, T* saved_values, int64_t t, size_t count, int64_t hv,
             T* s, bool last) {
    const auto& x = core.x;
    const auto& L = core.L;
    const size_t C = L.C, half = C * L.PW, stride = L.W * half;
    core.load_keys(t, count, hv / L.group);
    core.load_gate(t, count, hv);
    core.decay_readers();
    core.scores();
    core.load_values(x.dtype, x.v, t, count, hv, values + (L.W - 1) * half, stride);
    core.load_betas(t, count, hv);
    const bool keep_rests = saved_values != nullptr && x.beta != nullptr;
    for (size_t p = core.p0; p < core.p1; ++p) {
      T *value = values + p * stride, *sp = s + p * L.Kp * L.PW;
      panel(p, sp, value, keep_rests ? rests + p * half : nullptr, outputs + p * half);
      if (!last) core.advance_state(p, value, sp, sp);
    }
    core.store_values(x.dtype, out.o, t, count, hv, outputs, half);
    if (keep_rests) {
      core.store_values(kDTypeOf<T>, saved_values, t, count, hv, rests, half);
    } else if (saved_values != nullptr) {
      core.store_values(kDTypeOf<T>, saved_values, t, count, hv, values, stride);
    }
  }

  // What the next chunk, of n tokens from t, will touch.
  void expect(const DeltaRuleOutputs& out, const T* saved_values, int64_t t, int64_t n,
              int64_t hv) {
    const auto& x = core.x;
    for (const void* keys : {x.q, x.k, x.a, x.p}) core.expect_keys(keys, t, n, hv / core.L.group);
    core.expect_values(x.dtype, x.v, t, n, hv);
    core.expect_values(x.dtype, out.o, t, n, hv);
    core.expect_values(kDTypeOf<T>, saved_values, t, n, hv);
    const auto& L = core.L;
    core.ahead.spread((core.p1 - core.p0) *
                      ((2 * L.C - L.first) * blocks() + L.Kp * L.W * L.C / kSub) / kTileRows);
  }

  // On entry `value` holds V (separate form: in its second half); on return U, and V behind it in
  // the separate form. `rest` (or null) becomes U without beta, `output` O.
  void panel(size_t p, const T* s, T* value, T* rest, T* output) {
    const auto& L = core.L;
    const size_t C = L.C, Kp = L.Kp, PW = L.PW, columns = L.columns(p), ld = L.W * C;
    const auto between = [this]() HWY_ATTR { core.ahead.some_lines(); };
    const Depth depth{Kp / blocks(), blocks(), Kp / blocks(), Kp / blocks() * PW};
    if (core.x.erase == DeltaErase::kSeparate) {
      gemm<false>(FromTriangle<T, false>{core.Z + C, ld, value + C * PW, PW, C}, C, columns, depth,
                  core.bqE, Kp, s, PW, value, PW, between);
    } else if (L.first == 0) {
      gemm<false>(FromMatrix<T>{value, PW}, C, columns, depth, core.bqE, Kp, s, PW, value, PW,
                  between);
    }
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
  }

 public:
  Core<T> core;

 private:
  T* states;           // [heads][panels][Kp][PW]
  T* outputs;          // [panels][C][PW]
  T* values;           // [panels][W C][PW]
  T* rests = nullptr;  // [panels][C][PW] values without beta
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
