// SPDX-License-Identifier: Apache-2.0
// What the mixers of the delta-rule family share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "gdn/mixers/common/state_access.h"
#include "gdn/ops/delta_rule.h"

namespace gdn {

// q, k [B,T,H,K], v [B,T,HV,V], g and beta [B,T,HV] or absent (g also [B,T,HV,K]) -> o [B,T,HV,V],
// from and to the entry "recurrent" where the call has a state. form: "chunk", "recurrent" or
// "naive"; a decoding step always works in place on the pool.
at::Tensor delta_rule_with_state(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const ops::OptionalTensor& g, const ops::OptionalTensor& beta,
                                 std::string_view erase, std::string_view form, StateAccess& state);

// The form for T tokens: "naive"; or what `mode` ("chunk", "fused_recurrent") says, but that short
// inputs without gradients are always taken token by token.
const char* delta_rule_form(std::string_view mode, int64_t T, bool naive);

// x / sqrt(sum x^2 + 1e-6) over the last dimension.
at::Tensor l2norm(const at::Tensor& x, bool naive);

// [N,HV,K,V] in the dtype that states have for activations of `options`.
at::Tensor zero_recurrent_state(int64_t sequences, int64_t HV, int64_t K, int64_t V,
                                const at::TensorOptions& options);

// The default head_dim of a mixer whose state is a matrix: an eighth of the width rounded down to a
// power of two, from 64 to 256, and no more than the width.
int64_t default_head_dim(int64_t hidden_size);

}  // namespace gdn
