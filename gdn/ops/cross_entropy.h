// SPDX-License-Identifier: Apache-2.0
// Fused softmax cross-entropy as a differentiable PyTorch op.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "gdn/ops/common.h"

namespace gdn::ops {

// gdn::cross_entropy: (loss [...], logsumexp [...]) of logits [..., vocab] and int64 targets [...],
// each in [0, vocab) or ignore_index, where loss and gradient are 0. Both results are float32
// (float64 for float64 logits), unreduced; only the loss is differentiable.
inline std::tuple<at::Tensor, at::Tensor> cross_entropy(const at::Tensor& logits,
                                                        const at::Tensor& targets,
                                                        int64_t ignore_index = -100) {
  static const auto op =
      typed_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t)>(
          "gdn::cross_entropy");
  return op.call(logits, targets, ignore_index);
}

}  // namespace gdn::ops
