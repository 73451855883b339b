// SPDX-License-Identifier: Apache-2.0
// TTT-Linear and TTT-MLP (arXiv 2407.04620): layers whose state is a small model that each token
// trains; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/memory_state.h"
#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Ttt : public Mixer {
 public:
  Ttt(const char* name, bool mlp, const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  const char* name_;
  int64_t num_heads_, head_dim_;
  double base_lr_, rope_theta_, norm_eps_;
  bool share_qk_, inner_norm_;
  ops::MemoryConfig config_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, g_proj_, o_proj_;
  std::shared_ptr<ShortConvolution> conv_q_, conv_k_;
  std::shared_ptr<MemoryWeights> start_;
  at::Tensor lr_weight_, lr_bias_;      // [H,1,D], [H,1]
  at::Tensor token_idx_;                // [mini_batch_size]
  at::Tensor norm_weight_, norm_bias_;  // [H,head_dim]
  at::Tensor post_weight_, post_bias_;  // [H head_dim]
};

MixerInfo ttt_linear_info();
MixerInfo ttt_mlp_info();

}  // namespace gdn
