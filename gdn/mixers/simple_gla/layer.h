// SPDX-License-Identifier: Apache-2.0
// gated linear attention with one decay per head, fla's SimpleGatedLinearAttention; README.md of
// this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/gated_linear.h"

namespace gdn {

class SimpleGla : public GatedLinearMixer {
 public:
  explicit SimpleGla(const MixerArgs& args);

 protected:
  at::Tensor decay(const at::Tensor& x) const override;

 private:
  double normalizer_;
  std::shared_ptr<Linear> gk_proj_;
};

MixerInfo simple_gla_info();

}  // namespace gdn
