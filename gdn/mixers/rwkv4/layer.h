// SPDX-License-Identifier: Apache-2.0
// RWKV-4's time mix (arXiv 2305.13048), with Hugging Face's parameter names; README.md of this
// folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Rwkv4 : public Mixer {
 public:
  explicit Rwkv4(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  at::Tensor wkv(const at::Tensor& k, const at::Tensor& v, StateAccess& state) const;

  int64_t hidden_size_, width_;
  std::shared_ptr<Linear> key_, value_, receptance_, output_;
  at::Tensor time_decay_, time_first_;                              // [width]
  at::Tensor time_mix_key_, time_mix_value_, time_mix_receptance_;  // [1,1,D]
};

// The share of the token itself, against the one before, that RWKV-4's layer `layer` of `layers`
// starts with: (i/D)^(1 - layer/layers) for channel i, [1,1,D].
at::Tensor rwkv_initial_mix(int64_t hidden_size, int64_t layer, int64_t layers);

MixerInfo rwkv4_info();

}  // namespace gdn
