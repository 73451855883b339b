// SPDX-License-Identifier: Apache-2.0
// Causal softmax attention with rotary positions, grouped queries and an optional sliding window;
// README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Attention : public Mixer {
 public:
  explicit Attention(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  int64_t num_heads_, num_kv_heads_, head_dim_;
  int64_t window_;     // 0: everything
  double rope_theta_;  // 0: no rotary positions
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_;
  std::shared_ptr<RmsNorm> q_norm_, k_norm_;
};

MixerInfo attention_info();

}  // namespace gdn
