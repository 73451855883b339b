// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/feed_forward.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>

#include "gdn/ops/swiglu.h"

namespace gdn {

SwiGlu::SwiGlu(int64_t hidden_size, int64_t intermediate_size) {
  gate_proj_ =
      register_module("gate_proj", std::make_shared<Linear>(hidden_size, intermediate_size));
  up_proj_ = register_module("up_proj", std::make_shared<Linear>(hidden_size, intermediate_size));
  down_proj_ =
      register_module("down_proj", std::make_shared<Linear>(intermediate_size, hidden_size));
}

at::Tensor SwiGlu::forward(const at::Tensor& x, const Context&) {
  const at::Tensor gate = gate_proj_->forward(x), up = up_proj_->forward(x);
  return down_proj_->forward(naive_ ? at::silu(gate) * up : ops::swiglu(gate, up));
}

State SwiGlu::zero_state(int64_t, const at::TensorOptions&) const { return {}; }

std::shared_ptr<Mixer> make_feed_forward(const ModelConfig& config, const BlockConfig& block) {
  if (block.feed_forward.empty()) return nullptr;
  const int64_t inner = block.feed_forward_options.value("intermediate_size", config.ffn_size());
  return std::make_shared<SwiGlu>(config.hidden_size, inner);
}

}  // namespace gdn
