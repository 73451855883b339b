// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding as a differentiable PyTorch op.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::rotary: x [B,T,H,D] rotated by its tokens' positions, int64 [B,T] or [T] (the same for each
// sequence), half-split pairs (i, i + R/2) of the first R = rotary_dim (default D) dimensions; the
// others pass.
inline at::Tensor rotary(const at::Tensor& x, const at::Tensor& positions, double theta = 10000.0,
                         std::optional<int64_t> rotary_dim = {}) {
  static const auto op =
      typed_op<at::Tensor(const at::Tensor&, const at::Tensor&, double, std::optional<int64_t>)>(
          "gdn::rotary");
  return op.call(x, positions, theta, rotary_dim);
}

}  // namespace gdn::ops
