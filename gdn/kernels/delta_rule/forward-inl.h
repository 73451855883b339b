// SPDX-License-Identifier: Apache-2.0
// The chunk form forward for one value head of one sequence. Include inside the foreach_target
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
  Forward(const DeltaRuleParams& params, Carver& carve) : core(params, carve) {
    const auto& L = core.L;
    state = carve.take<T>(L.state_size());
    reads = carve.take<T>(L.panels * 2 * L.C * L.PW);
    values = carve.take<T>(L.panels * L.W * L.C * L.PW);
    if (params.beta != nullptr) rests = carve.take<T>(L.panels * L.C * L.PW);
  }

  void run(const DeltaRuleOutputs& out, int64_t n, int64_t hv, int64_t saved_offset) {
    const auto& x = core.x;
    const auto& L = core.L;
    const int64_t C = L.C, task = n * x.HV + hv, size = x.K * x.V;
    const auto range = delta_rule::sequence_range(x, n);
    const int64_t states = delta_rule::saved_states(range.end - range.begin);
    T* saved_values = x.erase == DeltaErase::kNone ? nullptr : static_cast<T*>(out.saved);
    T* saved = static_cast<T*>(out.saved);
    if (saved != nullptr) saved += saved_offset + hv * states * size;
    const T* initial = static_cast<const T*>(x.initial_state);
    core.load_state(initial != nullptr ? initial + task * size : nullptr, state);
    core.clear();
    for (int64_t t = range.begin; t < range.end; t += C) {
      const size_t count = std::min(C, range.end - t);
      const int64_t done = t - range.begin;
      if (saved != nullptr && done > 0 && done % delta_rule::kSegment == 0) {
        core.store_state(state, saved + (done / delta_rule::kSegment - 1) * size);
      }
      core.load_keys(t, count, hv / L.group);
      core.load_gate(t, count, hv);
      core.decay_readers();
      core.scores();
      if (t + C < range.end) {
        expect(out, saved_values, t + C, std::min(C, range.end - t - C), hv);
      } else if (hv + 1 < x.HV) {  // most likely this thread's next task
        expect(out, saved_values, range.begin, std::min(C, range.end - range.begin), hv + 1);
      }
      const bool last = t + C >= range.end && out.final_state == nullptr;
      const size_t read_stride = 2 * C * L.PW, value_stride = L.W * C * L.PW;
      core.load_values(x.dtype, x.v, t, count, hv, values + (L.W - 1) * C * L.PW, value_stride);
      core.load_betas(t, count, hv);
      const bool keep_rests = saved_values != nullptr && x.beta != nullptr;
      for (size_t p = 0; p < L.panels; ++p) {
        panel(p, reads + p * read_stride, values + p * value_stride,
              keep_rests ? rests + p * C * L.PW : nullptr);
        if (!last) {
          T* s = state + p * L.Kp * L.PW;
          core.advance_state(p, values + p * value_stride, s, s);
        }
      }
      core.store_values(x.dtype, out.o, t, count, hv, reads + C * L.PW, read_stride);
      if (keep_rests) {
        core.store_values(kDTypeOf<T>, saved_values, t, count, hv, rests, C * L.PW);
      } else if (saved_values != nullptr) {
        core.store_values(kDTypeOf<T>, saved_values, t, count, hv, values, value_stride);
      }
    }
    if (out.final_state != nullptr) {
      core.store_state(state, static_cast<T*>(out.final_state) + task * size);
    }
  }

  // What the next chunk, of n tokens from t, will touch.
  void expect(const DeltaRuleOutputs& out, const T* saved_values, int64_t t, int64_t n,
              int64_t hv) {
    const auto& x = core.x;
    core.ahead.clear();
    for (const void* keys : {x.q, x.k, x.a, x.p}) core.expect_keys(keys, t, n, hv / core.L.group);
    core.expect_values(x.dtype, x.v, t, n, hv);
    core.expect_values(x.dtype, out.o, t, n, hv);
    core.expect_values(kDTypeOf<T>, saved_values, t, n, hv);
    const auto& L = core.L;
    core.ahead.spread(L.panels * (2 * L.C - L.first + L.Kp) / kTileRows);
  }

  // On entry `value` holds V (separate form: in its second half); on return U, and V behind it in
  // the separate form. The second half of `read` becomes O, `rest` (or null) U without beta.
  void panel(size_t p, T* read, T* value, T* rest) {
    const auto& L = core.L;
    const size_t C = L.C, PW = L.PW, columns = L.columns(p), ld = L.W * C;
    gemm<Into::kSet, false>(2 * C - L.first, columns, L.Kp, core.bqE + L.first * L.Kp, L.Kp,
                            state + p * L.Kp * PW, PW, read + L.first * PW, PW,
                            [this]() HWY_ATTR { core.ahead.some_rows(); });
    if (core.x.erase == DeltaErase::kSeparate) {
      std::copy_n(read, C * PW, value);
      gemm_lower(C, columns, core.Z + C, ld, value + C * PW, PW, value, PW);
    } else if (L.first == 0) {
      add_scaled(C * PW, read, T(1), value);
    }
    if (L.first == 0) {
      core.with_beta(p, [&](auto factors) HWY_ATTR {
        solve_lower(C, columns, core.Z, ld, factors, value, PW, rest);
      });
    } else if (core.x.beta != nullptr) {
      core.times_beta(p, value, value);
    }
    for (size_t s = 0; s < L.W; ++s) {
      gemm_lower(C, columns, core.Z + C * ld + s * C, ld, value + s * C * PW, PW, read + C * PW,
                 PW);
    }
  }

  Core<T> core;
  T* state;            // [panels][Kp][PW]
  T* reads;            // [panels][2C][PW]
  T* values;           // [panels][W C][PW]
  T* rests = nullptr;  // [panels][C][PW] values without beta
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
