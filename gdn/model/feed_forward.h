// SPDX-License-Identifier: Apache-2.0
// Feed-forward blocks. They follow the mixers' contract, so that one with a state fits in as well.
// Their names and options are checked by ModelConfig::validate.
#pragma once

#include <memory>
#include <vector>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"
#include "gdn/model/config.h"

namespace gdn {

// "swiglu": down(SiLU(gate(x)) * up(x)), arXiv 2002.05202.
class SwiGlu : public Mixer {
 public:
  SwiGlu(int64_t hidden_size, int64_t intermediate_size);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  std::shared_ptr<Linear> gate_proj_, up_proj_, down_proj_;
};

// "rwkv_channel_mix": sigmoid(receptance(r)) * value(relu(key(k))^2) with k and r mixed from the
// token and the one before it (state "shift" [N,D]), arXiv 2305.13048. Names are Hugging Face's.
class RwkvChannelMix : public Mixer {
 public:
  RwkvChannelMix(int64_t hidden_size, int64_t intermediate_size, int64_t layer, int64_t layers);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  int64_t hidden_size_;
  std::shared_ptr<Linear> key_, receptance_, value_;
  at::Tensor time_mix_key_, time_mix_receptance_;  // [1,1,D]
};

struct MoeSizes {
  int64_t experts, experts_per_token;
  int64_t intermediate;         // of each expert
  int64_t shared_intermediate;  // of the expert that every token takes; 0: there is none
  bool normalise;               // the weights of a token's experts sum up to 1
  double balance;               // factor of the balance loss
};

// "moe": a mixture of SwiGLU experts as in Qwen's models. A token takes the experts with the
// largest softmax of gate(x), weighted by it, and the shared expert times sigmoid of its own gate.
// With gradients and ctx.shared it adds balance * E * sum_e (share of tokens at e) * (mean
// probability of e), arXiv 2101.03961 eq. 4-6, to the auxiliary loss.
class MixtureOfExperts : public Mixer {
 public:
  MixtureOfExperts(int64_t hidden_size, const MoeSizes& sizes);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  at::Tensor run_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& chosen);

  MoeSizes sizes_;
  std::shared_ptr<Linear> gate_, shared_expert_gate_;
  std::vector<std::shared_ptr<SwiGlu>> experts_;
  std::shared_ptr<SwiGlu> shared_expert_;
};

// The feed-forward of block i; null for none.
std::shared_ptr<Mixer> make_feed_forward(const ModelConfig& config, size_t i);

}  // namespace gdn
