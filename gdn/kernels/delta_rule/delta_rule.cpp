// SPDX-License-Identifier: Apache-2.0
// First version of the fast entry points: the oracle with its results rounded to the caller's
// types.
#include "gdn/kernels/delta_rule/delta_rule.h"

#include <algorithm>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/kernels/delta_rule/common.h"

namespace gdn {
namespace {

using Vec = std::vector<double>;

template <typename T>
Vec widen(const void* x, int64_t n) {
  Vec y(n);
  for (int64_t i = 0; i < n; ++i) y[i] = load(static_cast<const T*>(x) + i);
  return y;
}

template <typename T>
void narrow(const Vec& x, void* y) {
  if (y == nullptr) return;
  for (size_t i = 0; i < x.size(); ++i) {
    gdn::store(static_cast<T*>(y) + i, static_cast<Acc<T>>(x[i]));
  }
}

void forward(const DeltaRuleParams& x, void* o, void* final_state) {
  Vec o64(x.total_tokens * x.HV * x.V);
  Vec state64(final_state != nullptr ? x.num_sequences * x.HV * x.K * x.V : 0);
  delta_rule_naive_forward(x, o64.data(), final_state != nullptr ? state64.data() : nullptr);
  dispatch_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    narrow<T>(o64, o);
    narrow<Acc<T>>(state64, final_state);
  });
}

}  // namespace

int64_t delta_rule_saved_size(const DeltaRuleParams& params) { return 0; }

void delta_rule_chunk_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_chunk_forward");
  delta_rule::check_outputs(params, out, "delta_rule_chunk_forward");
  forward(params, out.o, out.final_state);
}

void delta_rule_recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_recurrent_forward");
  delta_rule::check_outputs(params, out, "delta_rule_recurrent_forward");
  forward(params, out.o, out.final_state);
}

void delta_rule_chunk_backward(const DeltaRuleParams& x, const void* saved,
                               const DeltaRuleGrads& grads) {
  delta_rule::check_params(x, "delta_rule_chunk_backward");
  delta_rule::check_grads(x, grads, "delta_rule_chunk_backward");
  const int64_t states = x.num_sequences * x.HV * x.K * x.V, key = x.total_tokens * x.H * x.K;
  dispatch_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    Vec d_o, d_final;
    if (grads.d_o != nullptr) d_o = widen<T>(grads.d_o, x.total_tokens * x.HV * x.V);
    if (grads.d_final_state != nullptr) d_final = widen<Acc<T>>(grads.d_final_state, states);
    Vec dq(key), dk(key), da(key), dp(key), dv(x.total_tokens * x.HV * x.V);
    Vec dg(x.total_tokens * x.HV * (x.gate == DeltaGate::kChannel ? x.K : 1));
    Vec dbeta(x.total_tokens * x.HV), ds(states);
    delta_rule_naive_backward(x, grads.d_o != nullptr ? d_o.data() : nullptr,
                              grads.d_final_state != nullptr ? d_final.data() : nullptr, dq.data(),
                              dk.data(), dv.data(), da.data(), dp.data(), dg.data(), dbeta.data(),
                              ds.data());
    narrow<T>(dq, grads.dq);
    narrow<T>(dk, grads.dk);
    narrow<T>(dv, grads.dv);
    narrow<T>(da, grads.da);
    narrow<T>(dp, grads.dp);
    narrow<Acc<T>>(dg, grads.dg);
    narrow<Acc<T>>(dbeta, grads.dbeta);
    narrow<Acc<T>>(ds, grads.d_initial_state);
  });
}

void delta_rule_step(const DeltaRuleParams& params, void* pool, int64_t num_slots,
                     const int64_t* slots, void* o) {
  DeltaRuleParams x = params;
  x.cu_seqlens = nullptr;
  x.initial_state = nullptr;
  delta_rule::check_params(x, "delta_rule_step");
  GDN_CHECK(x.total_tokens == x.num_sequences,
            "[delta_rule_step] total_tokens must be num_sequences ", x.num_sequences, ", got ",
            x.total_tokens);
  const int64_t size = x.HV * x.K * x.V;
  dispatch_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    A* states = static_cast<A*>(pool);
    std::vector<A> in(x.num_sequences * size, A(0)), out(in);
    for (int64_t n = 0; n < x.num_sequences; ++n) {
      const int64_t slot = slots != nullptr ? slots[n] : n;
      GDN_CHECK(slot < num_slots, "[delta_rule_step] slots must be below num_slots ", num_slots,
                ", got ", slot);
      if (slot >= 0) std::copy_n(states + slot * size, size, in.begin() + n * size);
    }
    x.initial_state = in.data();
    forward(x, o, out.data());
    for (int64_t n = 0; n < x.num_sequences; ++n) {
      const int64_t slot = slots != nullptr ? slots[n] : n;
      if (slot >= 0) {
        std::copy_n(out.begin() + n * size, size, states + slot * size);
      } else {
        std::fill_n(static_cast<T*>(o) + n * x.HV * x.V, x.HV * x.V, T{});
      }
    }
  });
}

}  // namespace gdn
