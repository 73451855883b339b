// SPDX-License-Identifier: Apache-2.0
// Mamba's selective scan (arXiv 2312.00752) as torch ops; kernel.h has the recurrence.
//
// x, dt and y are [B,T,C], B and C [B,T,S], all of one dtype (float32, float64, bfloat16, float16);
// A is [C,S] and must not be positive (not checked, for that would read data), D and dt_bias [C].
// States are [N,C,S] in float32 (float64 for float64 inputs). With cu_seqlens (int32 or int64
// [N+1]) the batch size must be 1 and the token axis holds N sequences, else N is the batch size.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

// softplus: the step sizes are softplus(dt + dt_bias) instead of dt + dt_bias. signed_transition:
// the transition is 2 exp(dt A) - 1 instead of exp(dt A). Returns (y, final_state, saved); a final
// state that was not asked for is empty, and so is `saved`, what selective_scan_bwd needs, unless
// `save` is true.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> selective_scan(
    const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& D,
    const std::optional<at::Tensor>& dt_bias, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, bool output_final_state, bool softplus,
    bool signed_transition, bool save) {
  static const auto op = typed_op<decltype(selective_scan)>("gdn::selective_scan");
  return op.call(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, output_final_state,
                 softplus, signed_transition, save);
}

// One token for each of N sequences, in place on a pool of states: x, dt [N,C], B, C [N,S], state
// [num_slots,C,S] contiguous, slots int64 [N], all different; sequence n uses state[slots[n]], or
// state[n] without slots. Where a slot is negative y is zero and no state is touched.
inline at::Tensor selective_scan_step_(const at::Tensor& x, const at::Tensor& dt,
                                       const at::Tensor& A, const at::Tensor& B,
                                       const at::Tensor& C, const std::optional<at::Tensor>& D,
                                       const std::optional<at::Tensor>& dt_bias, at::Tensor& state,
                                       const std::optional<at::Tensor>& slots, bool softplus,
                                       bool signed_transition) {
  static const auto op = typed_op<decltype(selective_scan_step_)>("gdn::selective_scan_step_");
  return op.call(x, dt, A, B, C, D, dt_bias, state, slots, softplus, signed_transition);
}

}  // namespace gdn::ops
