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

void delta_rule_recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_recurrent_forward");
  delta_rule::check_outputs(params, out, "delta_rule_recurrent_forward");
  forward(params, out.o, out.final_state);
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
