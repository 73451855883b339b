// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention without positions, as in Kimi Linear; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Mla : public Mixer {
 public:
  explicit Mla(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  at::Tensor queries(const at::Tensor& x);
  // q [B,T,H,nope+shared] over latents [B,S,1,rank+shared] -> [B,T,H,V].
  at::Tensor attend_expanded(const at::Tensor& q, const at::Tensor& latent);
  at::Tensor attend_absorbed(const at::Tensor& q, const at::Tensor& latent);

  int64_t num_heads_, nope_dim_, shared_dim_, v_dim_, rank_;
  bool absorb_;
  std::shared_ptr<Linear> q_proj_;  // or, with a rank for queries:
  std::shared_ptr<Linear> q_a_proj_, q_b_proj_;
  std::shared_ptr<RmsNorm> q_a_layernorm_;
  std::shared_ptr<Linear> kv_a_proj_with_mqa_, kv_b_proj_, o_proj_;
  std::shared_ptr<RmsNorm> kv_a_layernorm_;
};

MixerInfo mla_info();

}  // namespace gdn
