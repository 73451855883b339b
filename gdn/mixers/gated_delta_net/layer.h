// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet (arXiv 2412.06464), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class GatedDeltaNet : public Mixer {
 public:
  explicit GatedDeltaNet(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  int64_t num_heads_, num_v_heads_, head_dim_, head_v_dim_;
  bool use_gate_, use_short_conv_, allow_neg_eigval_, erase_;
  std::string mode_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, a_proj_, b_proj_, g_proj_, o_proj_;
  std::shared_ptr<ShortConvolution> q_conv1d_, k_conv1d_, v_conv1d_;
  std::shared_ptr<RmsNorm> o_norm_;
  at::Tensor A_log_, dt_bias_;  // [HV]
};

MixerInfo gated_delta_net_info();

}  // namespace gdn
