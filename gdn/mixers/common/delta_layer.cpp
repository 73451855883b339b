// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/delta_layer.h"

#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <bit>

#include "gdn/mixers/common/modules.h"
#include "gdn/ops/norm.h"

namespace gdn {

at::Tensor delta_rule_with_state(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const ops::OptionalTensor& g, const ops::OptionalTensor& beta,
                                 std::string_view erase, std::string_view form,
                                 StateAccess& state) {
  if (state.step() && form != "naive") {
    auto token = [](const ops::OptionalTensor& t) {
      return ops::has(t) ? ops::OptionalTensor(t->select(1, 0)) : std::nullopt;
    };
    const ops::OptionalTensor slots =
        state.slots().defined() ? ops::OptionalTensor(state.slots()) : std::nullopt;
    return ops::delta_rule_step_(q.select(1, 0), k.select(1, 0), v.select(1, 0), token(g),
                                 token(beta), std::nullopt, std::nullopt, state.pool("recurrent"),
                                 slots, std::nullopt, erase)
        .unsqueeze(1);
  }
  ops::OptionalTensor initial, cu_seqlens;
  if (state.given()) initial = state.read("recurrent").to(ops::acc_type(q.scalar_type()));
  if (state.cu_seqlens().defined()) cu_seqlens = state.cu_seqlens();
  auto [o, final_state, saved] = ops::delta_rule(
      q, k, v, g, beta, std::nullopt, std::nullopt, std::nullopt, initial, cu_seqlens,
      /*output_final_state=*/state.given(), erase, form, /*chunk_size=*/0, /*save=*/false);
  if (state.given()) state.write("recurrent", final_state);
  return o;
}

const char* delta_rule_form(std::string_view mode, int64_t T, bool naive) {
  // Up to this many tokens the recurrence beats the chunk form.
  constexpr int64_t kRecurrentUpTo = 64;
  if (naive) return "naive";
  const bool short_input = T <= kRecurrentUpTo && !c10::GradMode::is_enabled();
  return mode == "fused_recurrent" || short_input ? "recurrent" : "chunk";
}

at::Tensor l2norm(const at::Tensor& x, bool naive) {
  return naive ? naive::l2norm(x) : ops::l2norm(x);
}

at::Tensor zero_recurrent_state(int64_t sequences, int64_t HV, int64_t K, int64_t V,
                                const at::TensorOptions& options) {
  const auto dtype = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  return at::zeros({sequences, HV, K, V}, options.dtype(dtype));
}

int64_t default_head_dim(int64_t hidden_size) {
  const auto eighth = std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(hidden_size / 8, 1)));
  return std::min(hidden_size, std::clamp<int64_t>(static_cast<int64_t>(eighth), 64, 256));
}

}  // namespace gdn
