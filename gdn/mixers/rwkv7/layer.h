// SPDX-License-Identifier: Apache-2.0
// RWKV-7's time mixing (arXiv 2503.14456), fla's RWKV7Attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <string>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

// y = W_2 act(W_1 x) + bias, with fla's names lora.0 and lora.2. W_1 starts at zero, so that y
// starts as the bias.
class Lora : public torch::nn::Module {
 public:
  enum class Inner : uint8_t { kNone, kTanh, kSigmoid };
  // `bias` [out], or undefined for none.
  Lora(int64_t in_features, int64_t rank, int64_t out_features, Inner inner,
       const at::Tensor& bias);
  at::Tensor forward(const at::Tensor& x);

 private:
  Inner inner_;
  std::shared_ptr<Linear> down_, up_;
};

class Rwkv7 : public Mixer {
 public:
  explicit Rwkv7(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // v, after a layer that is not the first has mixed the first layer's v in.
  at::Tensor value(const at::Tensor& xv, const Context& ctx);
  at::Tensor group_norm(const at::Tensor& o) const;
  void initialize(int64_t layers);

  HeadSizes sizes_;
  std::string mode_;
  int64_t layer_;
  double norm_eps_;
  std::shared_ptr<Linear> r_proj_, k_proj_, v_proj_, o_proj_;
  std::shared_ptr<Lora> w_lora_, v_lora_, a_lora_, g_lora_;
  std::shared_ptr<torch::nn::Module> g_norm_;
  std::array<at::Tensor, 6> mixes_;         // [1,1,D] each, see kMixes
  at::Tensor k_k_, k_a_, r_k_;              // [H K], [H K], [H,K]
  at::Tensor g_norm_weight_, g_norm_bias_;  // [H V]
};

MixerInfo rwkv7_info();

}  // namespace gdn
