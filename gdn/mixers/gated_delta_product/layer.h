// SPDX-License-Identifier: Apache-2.0
// Gated DeltaProduct (arXiv 2502.10297), the layer of flash-linear-attention; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class GatedDeltaProduct : public DeltaMixer {
 public:
  explicit GatedDeltaProduct(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  int64_t steps_;  // delta steps per token
  bool use_forget_gate_, allow_neg_eigval_;
  std::shared_ptr<Linear> a_proj_, b_proj_;
  ScalarDecay decay_;
};

MixerInfo gated_delta_product_info();

}  // namespace gdn
