// SPDX-License-Identifier: Apache-2.0
// RetNet's retention (arXiv 2307.08621), fla's MultiScaleRetention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include "gdn/mixers/common/gated_linear.h"

namespace gdn {

class Retention : public GatedLinearMixer {
 public:
  explicit Retention(const MixerArgs& args);
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 protected:
  at::Tensor decay(const at::Tensor& x) const override;
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  double rope_theta_;
};

MixerInfo retention_info();

}  // namespace gdn
