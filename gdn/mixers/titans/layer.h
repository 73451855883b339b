// SPDX-License-Identifier: Apache-2.0
// Titans (arXiv 2501.00663): the long-term memory as a layer of its own, as a gate beside attention
// (MAG), as a layer before attention (MAL), and as context of attention (MAC); README.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>

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
  struct Tokens;
  struct Loop;
  // Of a segment: of what was read from the memory and of the tokens, each [R,n,H,head_dim].
  using KeysAndValues = std::array<at::Tensor, 4>;

  at::Tensor heads(const at::Tensor& x) const;
  Loop begin(const at::Tensor& x);
  Tokens project(const at::Tensor& x, StateAccess& state, int64_t position,
                 const PrefixKeys& prefix);
  // Sequences at the same position; `local` holds their states.
  at::Tensor run(const at::Tensor& x, State& local, int64_t position, const Loop& loop);
  std::pair<at::Tensor, at::Tensor> block(const Tokens& tokens, State& local, int64_t position,
                                          const Loop& loop, KeysAndValues& segment);

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
