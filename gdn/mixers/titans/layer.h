// SPDX-License-Identifier: Apache-2.0
// Titans (arXiv 2501.00663): the long-term memory as a layer of its own, as a gate beside attention
// (MAG), as a layer before attention (MAL), and as context of attention (MAC); README.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/mixer.h"
#include "gdn/mixers/titans/attention.h"
#include "gdn/mixers/titans/neural_memory.h"

namespace gdn {

class TitansLmm : public Mixer {
 public:
  explicit TitansLmm(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  std::shared_ptr<NeuralMemory> memory_;
  std::optional<HeadOutput> output_;
};

// MAG and MAL.
class TitansBeside : public Mixer {
 public:
  TitansBeside(const char* name, bool layered, const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  const char* name_;
  bool layered_;           // MAL
  at::Tensor persistent_;  // [N_p,D], undefined: none
  std::shared_ptr<NeuralMemory> memory_;
  std::shared_ptr<WindowAttention> attention_;
  std::shared_ptr<BranchGate> gate_;
  std::shared_ptr<RmsNorm> memory_norm_;
  std::shared_ptr<Linear> o_proj_;
};

class TitansMac : public Mixer {
 public:
  explicit TitansMac(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // Sequences at the same position; `local` holds their states.
  at::Tensor run(const at::Tensor& x, State& local, int64_t position);
  at::Tensor block(const at::Tensor& x, State& local, int64_t position, const PrefixKeys& prefix);

  int64_t num_heads_, head_dim_, segment_, delay_;
  double rope_theta_;
  at::Tensor persistent_;  // [N_p,D], undefined: none
  std::shared_ptr<NeuralMemory> memory_;
  std::shared_ptr<BranchGate> gate_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, attn_o_proj_, memory_o_proj_, o_proj_;
};

MixerInfo titans_lmm_info();
MixerInfo titans_mag_info();
MixerInfo titans_mal_info();
MixerInfo titans_mac_info();

}  // namespace gdn
