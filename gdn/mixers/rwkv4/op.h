// SPDX-License-Identifier: Apache-2.0
// RWKV-4's wkv (arXiv 2305.13048) as torch ops; kernel.h has the recurrence.
//
// w and u are [C], k, v and y [B,T,C] of one dtype (float32, float64, bfloat16, float16); w must
// not be positive (not checked, for that would read data). States are [N,3,C] in float32 (float64
// for float64 inputs): numerator, denominator, largest exponent; zeros are a fresh start. With
// cu_seqlens (int32 or int64 [N+1]) the batch size must be 1 and the token axis holds N sequences,
// else N is the batch size.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

// Returns (y, final_state, saved); a final state that was not asked for is empty, and so is
// `saved`, what wkv_bwd needs, unless `save` is true.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv(
    const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
    bool output_final_state, bool save) {
  static const auto op = typed_op<decltype(wkv)>("gdn::wkv");
  return op.call(w, u, k, v, initial_state, cu_seqlens, output_final_state, save);
}

// One token for each of N sequences, in place on a pool of states: k, v [N,C], state
// [num_slots,3,C] contiguous, slots int64 [N], all different; sequence n uses state[slots[n]], or
// state[n] without slots. Where a slot is negative y is zero and no state is touched.
inline at::Tensor wkv_step_(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                            const at::Tensor& v, at::Tensor& state,
                            const std::optional<at::Tensor>& slots) {
  static const auto op = typed_op<decltype(wkv_step_)>("gdn::wkv_step_");
  return op.call(w, u, k, v, state, slots);
}

}  // namespace gdn::ops
