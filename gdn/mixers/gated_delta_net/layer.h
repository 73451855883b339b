// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet (arXiv 2412.06464), the layer of flash-linear-attention; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class GatedDeltaNet : public Mixer {
 public:
  explicit GatedDeltaNet(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  HeadSizes sizes_;
  bool allow_neg_eigval_, erase_;
  std::string mode_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, a_proj_, b_proj_;
  ScalarDecay decay_;
  std::optional<QkvConvolution> convs_;
  std::optional<HeadOutput> output_;
};

MixerInfo gated_delta_net_info();

}  // namespace gdn
