// SPDX-License-Identifier: Apache-2.0
// DeltaNet (arXiv 2406.06484), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class DeltaNet : public Mixer {
 public:
  explicit DeltaNet(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  at::Tensor activate(const at::Tensor& qk) const;
  at::Tensor normalize(const at::Tensor& qk) const;

  HeadSizes sizes_;
  bool use_beta_, allow_neg_eigval_;
  std::string mode_, qk_activation_, qk_norm_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, b_proj_;
  std::optional<QkvConvolution> convs_;
  std::optional<HeadOutput> output_;
};

MixerInfo delta_net_info();

}  // namespace gdn
