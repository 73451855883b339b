// SPDX-License-Identifier: Apache-2.0
// The short causal depthwise convolution as PyTorch ops. activation: nothing, "silu" or "swish".
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::causal_conv1d: (y [B,T,C], final_state [N,C,W]) of x [B,T,C] (which may be a slice of a
// wider tensor), weight [C,W], bias [C]. A state holds the last W inputs of a sequence, the newest
// in column W-1. With cu_seqlens [N+1] B must be 1 and the T axis holds N sequences, else N = B.
// initial_state [N,C,W] has the dtype of x; without it the past is zero. final_state is an empty
// tensor unless output_final_state. Differentiable in all tensors, both outputs.
inline std::tuple<at::Tensor, at::Tensor> causal_conv1d(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias = {},
    const std::optional<at::Tensor>& initial_state = {},
    const std::optional<at::Tensor>& cu_seqlens = {}, bool output_final_state = false,
    std::optional<std::string_view> activation = {}) {
  static const auto op = typed_op<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool,
      std::optional<std::string_view>)>("gdn::causal_conv1d");
  return op.call(x, weight, bias, initial_state, cu_seqlens, output_final_state, activation);
}

// gdn::causal_conv1d_update_: one token x [N,C] (or [N,1,C]) for each of N sequences, with the
// states updated in place: sequence n has conv_state[slots[n]] of conv_state [S,C,W] (conv_state[n]
// without slots). A negative slot gives zeros and touches nothing. Not differentiable.
inline at::Tensor causal_conv1d_update_(const at::Tensor& x, at::Tensor& conv_state,
                                        const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias = {},
                                        const std::optional<at::Tensor>& slots = {},
                                        std::optional<std::string_view> activation = {}) {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                          std::optional<std::string_view>)>("gdn::causal_conv1d_update_");
  return op.call(x, conv_state, weight, bias, slots, activation);
}

}  // namespace gdn::ops
