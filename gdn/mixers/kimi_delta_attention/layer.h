// SPDX-License-Identifier: Apache-2.0
// Kimi Delta Attention (arXiv 2510.26692), the layer of flash-linear-attention; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class KimiDeltaAttention : public DeltaMixer {
 public:
  explicit KimiDeltaAttention(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  bool allow_neg_eigval_;
  std::shared_ptr<Linear> b_proj_;
  LowRankDecay decay_;
};

MixerInfo kimi_delta_attention_info();

}  // namespace gdn
