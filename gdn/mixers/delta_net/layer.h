// SPDX-License-Identifier: Apache-2.0
// DeltaNet (arXiv 2406.06484), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/modules.h"
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

  int64_t num_heads_, head_k_dim_, head_v_dim_;
  bool use_beta_, use_gate_, use_short_conv_, allow_neg_eigval_;
  std::string mode_, qk_activation_, qk_norm_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, b_proj_, g_proj_, o_proj_;
  std::shared_ptr<ShortConvolution> q_conv1d_, k_conv1d_, v_conv1d_;
  std::shared_ptr<RmsNorm> o_norm_;
};

MixerInfo delta_net_info();

}  // namespace gdn
