// SPDX-License-Identifier: Apache-2.0
// DeltaNet (arXiv 2406.06484), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class DeltaNet : public DeltaMixer {
 public:
  explicit DeltaNet(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  at::Tensor activate(const at::Tensor& qk) const;

  bool use_beta_, allow_neg_eigval_;
  std::string qk_activation_, qk_norm_;
  std::shared_ptr<Linear> b_proj_;
};

MixerInfo delta_net_info();

}  // namespace gdn
