// SPDX-License-Identifier: Apache-2.0
// Linear attention (arXiv 2006.16236) with a choice of feature maps; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

// phi(x) of heads x [B,T,H,K].
class FeatureMap : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x) = 0;  // [B,T,H,features]
};

class LinearAttention : public DeltaMixer {
 public:
  explicit LinearAttention(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;
  at::Tensor output(const at::Tensor& o, const at::Tensor& x) override;
  HeadSizes state_sizes() const override;

 private:
  int64_t features_;
  bool norm_q_, norm_k_, normalize_;
  std::shared_ptr<FeatureMap> feature_map_q_, feature_map_k_;
};

MixerInfo linear_attention_info();

}  // namespace gdn
