// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "gdn/mixers/common/modules.h"
#include "gdn/ops/loop_weight.h"

namespace gdn {

// Layers without bias that a call applies to x part after part, because each part needs what the
// part before has left. Casts and joins of the weights, and their gradients, are the call's, not
// the part's.
class LoopLinear {
 public:
  // `x`: the input of the whole call, or something with as many rows of its dtype.
  LoopLinear(std::vector<Linear*> layers, const at::Tensor& x);
  std::vector<at::Tensor> forward(const at::Tensor& part /* [...,in] */) const;  // per layer

 private:
  std::vector<Linear*> layers_;
  std::vector<int64_t> sizes_;
  std::optional<ops::LoopWeight> weight_;  // of all layers; none: few rows in all, as in decoding
};

}  // namespace gdn
