// SPDX-License-Identifier: Apache-2.0
// SwiGLU's elementwise part as a differentiable PyTorch op.
#pragma once

#include <ATen/core/Tensor.h>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::swiglu: silu(gate) * up, both of one shape and dtype; they may be slices of one projection.
inline at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op = typed_op<at::Tensor(const at::Tensor&, const at::Tensor&)>("gdn::swiglu");
  return op.call(gate, up);
}

}  // namespace gdn::ops
