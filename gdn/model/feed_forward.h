// SPDX-License-Identifier: Apache-2.0
// Feed-forward blocks. They follow the mixers' contract, so that one with a state fits in as well.
#pragma once

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"
#include "gdn/model/config.h"

namespace gdn {

// down(SiLU(gate(x)) * up(x)), arXiv 2002.05202.
class SwiGlu : public Mixer {
 public:
  SwiGlu(int64_t hidden_size, int64_t intermediate_size);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  std::shared_ptr<Linear> gate_proj_, up_proj_, down_proj_;
};

// The feed-forward that `block` names; null for none.
std::shared_ptr<Mixer> make_feed_forward(const ModelConfig& config, const BlockConfig& block);

}  // namespace gdn
