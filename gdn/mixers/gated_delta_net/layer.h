// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet (arXiv 2412.06464), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class GatedDeltaNet : public DeltaMixer {
 public:
  explicit GatedDeltaNet(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  bool allow_neg_eigval_, erase_;
  std::shared_ptr<Linear> a_proj_, b_proj_;
  ScalarDecay decay_;
};

MixerInfo gated_delta_net_info();

}  // namespace gdn
