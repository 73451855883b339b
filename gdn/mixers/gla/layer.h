// SPDX-License-Identifier: Apache-2.0
// gated linear attention (arXiv 2312.06635), fla's GatedLinearAttention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "gdn/mixers/common/gated_linear.h"

namespace gdn {

class GatedLinearAttention : public GatedLinearMixer {
 public:
  explicit GatedLinearAttention(const MixerArgs& args);

 protected:
  at::Tensor decay(const at::Tensor& x) const override;

 private:
  double normalizer_;
  std::optional<double> clamp_min_;
  std::shared_ptr<LowRank> gk_proj_;
};

MixerInfo gla_info();

}  // namespace gdn
