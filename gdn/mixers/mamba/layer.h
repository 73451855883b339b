// SPDX-License-Identifier: Apache-2.0
// Mamba (arXiv 2312.00752), the layer of state-spaces/mamba and Hugging Face; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Mamba : public Mixer {
 public:
  explicit Mamba(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // The step size's projection, which starts from its own distribution.
  class StepProjection : public torch::nn::Module {
   public:
    StepProjection(int64_t rank, int64_t channels);
    at::Tensor weight, bias;  // [C,rank] and [C]
  };

  at::Tensor scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& B,
                  const at::Tensor& C, StateAccess& state) const;

  int64_t channels_, states_, rank_;
  bool allow_neg_eigval_;
  std::shared_ptr<Linear> in_proj_, x_proj_, out_proj_;
  std::shared_ptr<StepProjection> dt_proj_;
  std::shared_ptr<ShortConvolution> conv1d_;
  at::Tensor A_log_, D_;  // [C,S] and [C]
};

MixerInfo mamba_info();

}  // namespace gdn
