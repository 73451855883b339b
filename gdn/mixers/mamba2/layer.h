// SPDX-License-Identifier: Apache-2.0
// Mamba-2 (arXiv 2405.21060), the layer of state-spaces/mamba and Hugging Face; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Mamba2 : public Mixer {
 public:
  explicit Mamba2(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // RMSNorm over each of `groups` equal parts of the last dimension, with one weight for all of it.
  class GroupedNorm : public torch::nn::Module {
   public:
    GroupedNorm(int64_t size, int64_t groups, double eps);
    at::Tensor forward(const at::Tensor& x, bool naive) const;
    at::Tensor weight;

   private:
    int64_t groups_;
    double eps_;
  };

  int64_t num_heads_, head_dim_, states_, groups_;  // H, V, K and the number of B and C
  std::string mode_;
  std::shared_ptr<Linear> in_proj_, out_proj_;
  std::shared_ptr<ShortConvolution> conv1d_;
  std::shared_ptr<GroupedNorm> norm_;
  at::Tensor A_log_, dt_bias_, D_;  // [H]
};

MixerInfo mamba2_info();

}  // namespace gdn
