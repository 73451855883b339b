// SPDX-License-Identifier: Apache-2.0
// The delta-rule engine as torch ops; see gdn/kernels/delta_rule/delta_rule.h for the recurrence.
//
// gdn::delta_rule is the one differentiable op; delta_rule_family.cpp builds the ops with fla's
// names from it (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_kda,
// chunk_delta_rule, chunk_linear_attn, chunk_simple_gla, chunk_gla, chunk_dplr_delta_rule,
// naive_gated_delta_rule and the in-place gated_delta_rule_step_).
//
// Common to all: q, k [B,T,H,K], v and o [B,T,HV,V] of one dtype (float32, float64, bfloat16,
// float16), HV a multiple of H: value head j reads query and key head j / (HV / H). Gates are
// natural logarithms and must be <= 0; that is not checked, for it would read data. States are
// [N,HV,K,V] in float32 (float64 for float64 inputs). With cu_seqlens (int32 or int64 [N+1]) B must
// be 1 and the token axis holds N sequences one after another, else N = B. A final state that was
// not asked for is an empty tensor. Backward twice is not supported and says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

using OptionalTensor = std::optional<at::Tensor>;

// erase: "none" (a = 0), "key" (a = k), "own" (a given), "separate" (a and p given, beta absent).
// form: "chunk", "recurrent" (token by token, faster for short T) or "naive" (the double-precision
// token loop). g: [B,T,HV] or [B,T,HV,K], beta: [B,T,HV] or [B,T,HV,V], a and p: [B,T,H,K]; g, beta
// and the initial state in float32 (float64 for float64 q). scale: K^-0.5 by default. chunk_size: 0
// (automatic), 16, 32 or 64. qk_l2norm: rows of q and k are first divided by their length, in the
// kernel (a is not). Returns (o, final_state, saved). `saved` is what a call of
// delta_rule_bwd can use instead of computing it again: empty unless save is true; differentiable
// calls keep it to themselves.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> delta_rule(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& g,
    const OptionalTensor& beta, const OptionalTensor& a, const OptionalTensor& p,
    std::optional<double> scale, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool output_final_state, std::string_view erase,
    std::string_view form, int64_t chunk_size, bool save, bool qk_l2norm = false) {
  static const auto op = typed_op<decltype(delta_rule)>("gdn::delta_rule");
  return op.call(q, k, v, g, beta, a, p, scale, initial_state, cu_seqlens, output_final_state,
                 erase, form, chunk_size, save, qk_l2norm);
}

// Gradients of o and final_state (either may be absent) to those of (q, k, v, g, beta, a, p,
// initial_state); empty tensors where there is no such input.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                  at::Tensor, at::Tensor>
delta_rule_bwd(const OptionalTensor& d_o, const OptionalTensor& d_final_state, const at::Tensor& q,
               const at::Tensor& k, const at::Tensor& v, const OptionalTensor& g,
               const OptionalTensor& beta, const OptionalTensor& a, const OptionalTensor& p,
               std::optional<double> scale, const OptionalTensor& initial_state,
               const OptionalTensor& cu_seqlens, const at::Tensor& saved, std::string_view erase,
               std::string_view form, int64_t chunk_size, bool qk_l2norm = false) {
  static const auto op = typed_op<decltype(delta_rule_bwd)>("gdn::delta_rule_bwd");
  return op.call(d_o, d_final_state, q, k, v, g, beta, a, p, scale, initial_state, cu_seqlens,
                 saved, erase, form, chunk_size, qk_l2norm);
}

// One token for each of N sequences, in place on a pool of states: q, k, a, p [N,H,K], v [N,HV,V],
// g [N,HV] or [N,HV,K], beta [N,HV] or [N,HV,V], state [num_slots,HV,K,V] contiguous, slots int64
// [N], all different; sequence n uses state[slots[n]], or state[n] without slots. The state
// may also be bfloat16 (not for float64 q): half the memory, rounded to nearest even after each
// step. Where a slot is negative o is zero and nothing is changed. Not differentiable. Returns o
// [N,HV,V].
inline at::Tensor delta_rule_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const OptionalTensor& g, const OptionalTensor& beta,
                                   const OptionalTensor& a, const OptionalTensor& p,
                                   at::Tensor& state, const OptionalTensor& slots,
                                   std::optional<double> scale, std::string_view erase,
                                   bool qk_l2norm = false) {
  static const auto op = typed_op<decltype(delta_rule_step_)>("gdn::delta_rule_step_");
  return op.call(q, k, v, g, beta, a, p, state, slots, scale, erase, qk_l2norm);
}

}  // namespace gdn::ops
