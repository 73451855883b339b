// SPDX-License-Identifier: Apache-2.0
// Qwen3-Next's gated attention: softmax attention with an output gate, normed queries and keys and
// partial rotary positions; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class GatedAttention : public Mixer {
 public:
  explicit GatedAttention(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // RMSNorm whose weight is the scale's distance from 1 and starts from zero.
  class ZeroCentredNorm : public torch::nn::Module {
   public:
    ZeroCentredNorm(int64_t size, double eps);
    at::Tensor forward(const at::Tensor& x, bool naive) const;
    at::Tensor weight;

   private:
    double eps_;
  };

  int64_t num_heads_, num_kv_heads_, head_dim_, rotary_dim_;
  double rope_theta_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_;  // q_proj: query and gate per head
  std::shared_ptr<ZeroCentredNorm> q_norm_, k_norm_;
};

MixerInfo gated_attention_info();

}  // namespace gdn
