// SPDX-License-Identifier: Apache-2.0
// Norms over the last dimension as differentiable PyTorch ops. Every argument may be a strided
// slice.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::l2norm: x / sqrt(sum x^2 + eps), x [..., D].
inline at::Tensor l2norm(const at::Tensor& x, double eps = 1e-6) {
  static const auto op = typed_op<at::Tensor(const at::Tensor&, double)>("gdn::l2norm");
  return op.call(x, eps);
}

// gdn::rms_norm: x / sqrt(mean x^2 + eps) * weight, x [..., D], weight [D] of any floating dtype.
inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps = 1e-5) {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, const at::Tensor&, double)>("gdn::rms_norm");
  return op.call(x, weight, eps);
}

// gdn::rms_norm_gated: rms_norm(x, weight, eps) * act(gate), gate as x; activation "silu" (or
// "swish") or "sigmoid".
inline at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& gate, double eps = 1e-5,
                                 std::string_view activation = "silu") {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                          std::string_view)>("gdn::rms_norm_gated");
  return op.call(x, weight, gate, eps, activation);
}

// A residual sum and the norm that reads it, in one pass: sum = x + scale * y, norm =
// rms_norm(sum).
inline std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& y,
                                                       const at::Tensor& weight, double scale = 1.0,
                                                       double eps = 1e-5) {
  static const auto op = typed_op<decltype(add_rms_norm)>("gdn::add_rms_norm");
  return op.call(x, y, weight, scale, eps);
}

}  // namespace gdn::ops
