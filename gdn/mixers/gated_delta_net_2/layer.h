// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet-2 (arXiv 2605.22791), the layer of flash-linear-attention; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class GatedDeltaNet2 : public DeltaMixer {
 public:
  explicit GatedDeltaNet2(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  bool allow_neg_eigval_;
  std::shared_ptr<Linear> b_proj_, w_proj_;
  LowRankDecay decay_;
};

MixerInfo gated_delta_net_2_info();

}  // namespace gdn
