// SPDX-License-Identifier: Apache-2.0
// The gates of the delta-rule family as differentiable PyTorch ops. Results are float32 (float64
// for float64 input), whatever the dtype of the raw projections, since that is what the delta-rule
// ops take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::gdn_gate: g [..., HV] = -exp(A_log) * softplus(a + dt_bias), a [..., HV], A_log and dt_bias
// [HV]. g is a natural logarithm, <= 0.
inline at::Tensor gdn_gate(const at::Tensor& a, const at::Tensor& A_log,
                           const std::optional<at::Tensor>& dt_bias = {}) {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>(
          "gdn::gdn_gate");
  return op.call(a, A_log, dt_bias);
}

// gdn::kda_gate: the same per key channel, a [..., HV, K], A_log [HV], dt_bias [HV*K]. With
// lower_bound < 0 it is g = lower_bound * sigmoid(exp(A_log) * (a + dt_bias)).
inline at::Tensor kda_gate(const at::Tensor& a, const at::Tensor& A_log,
                           const std::optional<at::Tensor>& dt_bias = {},
                           std::optional<double> lower_bound = {}) {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                          std::optional<double>)>("gdn::kda_gate");
  return op.call(a, A_log, dt_bias, lower_bound);
}

// gdn::beta_sigmoid: beta = sigmoid(b), times 2 with allow_neg_eigval; any shape.
inline at::Tensor beta_sigmoid(const at::Tensor& b, bool allow_neg_eigval = false) {
  static const auto op = typed_op<at::Tensor(const at::Tensor&, bool)>("gdn::beta_sigmoid");
  return op.call(b, allow_neg_eigval);
}

}  // namespace gdn::ops
