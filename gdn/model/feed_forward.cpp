// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/feed_forward.h"

#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <string>
#include <vector>

#include "gdn/mixers/common/token_shift.h"
#include "gdn/mixers/rwkv4/layer.h"
#include "gdn/ops/common.h"
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
  const std::vector<at::Tensor> projected = forward_all(x, {gate_proj_.get(), up_proj_.get()});
  const at::Tensor &gate = projected[0], &up = projected[1];
  return down_proj_->forward(naive_ ? at::silu(gate) * up : ops::swiglu(gate, up));
}

State SwiGlu::zero_state(int64_t, const at::TensorOptions&) const { return {}; }

RwkvChannelMix::RwkvChannelMix(int64_t hidden_size, int64_t intermediate_size, int64_t layer,
                               int64_t layers)
    : hidden_size_(hidden_size) {
  {
    c10::NoGradGuard no_grad;
    time_mix_key_ = rwkv_initial_mix(hidden_size, layer, layers);
    time_mix_receptance_ = time_mix_key_.clone();
  }
  time_mix_key_ = register_parameter("time_mix_key", time_mix_key_);
  time_mix_receptance_ = register_parameter("time_mix_receptance", time_mix_receptance_);
  key_ = register_module("key", std::make_shared<Linear>(hidden_size, intermediate_size));
  receptance_ = register_module("receptance", std::make_shared<Linear>(hidden_size, hidden_size));
  value_ = register_module("value", std::make_shared<Linear>(intermediate_size, hidden_size));
}

at::Tensor RwkvChannelMix::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state("rwkv_channel_mix", x, ctx, *this);
  const at::Tensor before = token_shift(x, state, "shift");
  const at::Tensor k = key_->forward(at::lerp(before, x, time_mix_key_.to(x.scalar_type())));
  const at::Tensor r =
      receptance_->forward(at::lerp(before, x, time_mix_receptance_.to(x.scalar_type())));
  return at::sigmoid(r) * value_->forward(at::relu(k).square());
}

State RwkvChannelMix::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("shift", zero_shift_state(sequences, hidden_size_, options));
  return state;
}

MixtureOfExperts::MixtureOfExperts(int64_t hidden_size, const MoeSizes& sizes) : sizes_(sizes) {
  gate_ = register_module("gate", std::make_shared<Linear>(hidden_size, sizes.experts));
  const auto list = register_module("experts", std::make_shared<torch::nn::Module>());
  for (int64_t e = 0; e < sizes.experts; ++e) {
    experts_.push_back(list->register_module(
        std::to_string(e), std::make_shared<SwiGlu>(hidden_size, sizes.intermediate)));
  }
  if (sizes.shared_intermediate > 0) {
    shared_expert_ = register_module(
        "shared_expert", std::make_shared<SwiGlu>(hidden_size, sizes.shared_intermediate));
    shared_expert_gate_ =
        register_module("shared_expert_gate", std::make_shared<Linear>(hidden_size, 1));
  }
}

// x [M,D], weights and chosen experts [M,k] -> [M,D]. Tokens are put together by expert.
at::Tensor MixtureOfExperts::run_experts(const at::Tensor& x, const at::Tensor& weights,
                                         const at::Tensor& chosen) {
  at::Tensor sum = at::zeros_like(x);
  if (naive_) {
    for (int64_t e = 0; e < sizes_.experts; ++e) {
      const at::Tensor weight = (weights * (chosen == e)).sum(1, /*keepdim=*/true);
      sum = sum + weight * experts_[static_cast<size_t>(e)]->forward(x, {});
    }
    return sum;
  }
  const at::Tensor flat = chosen.flatten();
  const at::Tensor order = at::argsort(flat, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor tokens = order.floor_divide(sizes_.experts_per_token);
  const at::Tensor rows = at::index_select(x, 0, tokens);
  const at::Tensor counts = at::bincount(flat, {}, sizes_.experts).to(at::kCPU);
  std::vector<at::Tensor> outs;
  int64_t begin = 0;
  for (int64_t e = 0; e < sizes_.experts; ++e) {
    const int64_t count = counts.const_data_ptr<int64_t>()[e];
    if (count == 0) continue;
    outs.push_back(experts_[static_cast<size_t>(e)]->forward(rows.narrow(0, begin, count), {}));
    begin += count;
  }
  const at::Tensor scale = at::index_select(weights.flatten(), 0, order).unsqueeze(1);
  return at::index_add(sum, 0, tokens, at::cat(outs, 0) * scale);
}

at::Tensor MixtureOfExperts::forward(const at::Tensor& x, const Context& ctx) {
  const at::Tensor flat = x.flatten(0, -2);  // [M,D]
  if (flat.size(0) == 0) return at::zeros_like(x);
  const at::ScalarType acc = ops::acc_type(x.scalar_type());
  const at::Tensor probabilities = at::softmax(gate_->forward(flat).to(acc), -1);  // [M,E]
  auto [weights, chosen] = at::topk(probabilities, sizes_.experts_per_token, -1);
  if (sizes_.normalise) weights = weights / weights.sum(-1, /*keepdim=*/true);
  at::Tensor y = run_experts(flat, weights.to(x.scalar_type()), chosen);
  if (shared_expert_)
    y = y + at::sigmoid(shared_expert_gate_->forward(flat)) * shared_expert_->forward(flat, {});
  if (ctx.shared != nullptr && sizes_.balance > 0 && c10::GradMode::is_enabled()) {
    const at::Tensor share =
        at::bincount(chosen.flatten(), {}, sizes_.experts).to(acc) / flat.size(0);
    const at::Tensor loss = (share * probabilities.mean(0)).sum() *
                            (sizes_.balance * static_cast<double>(sizes_.experts));
    at::Tensor& sum = ctx.shared->auxiliary_loss;
    sum = sum.defined() ? sum + loss : loss;
  }
  return y.view_as(x);
}

State MixtureOfExperts::zero_state(int64_t, const at::TensorOptions&) const { return {}; }

std::shared_ptr<Mixer> make_feed_forward(const ModelConfig& config, size_t i) {
  const BlockConfig& block = config.blocks[i];
  const nlohmann::json& options = block.feed_forward_options;
  const int64_t D = config.hidden_size;
  if (block.feed_forward == "swiglu")
    return std::make_shared<SwiGlu>(D, options.value("intermediate_size", config.ffn_size()));
  if (block.feed_forward == "rwkv_channel_mix") {
    const int64_t inner = config.intermediate_size.value_or(config.hidden_ratio * D);
    return std::make_shared<RwkvChannelMix>(D, options.value("intermediate_size", inner),
                                            static_cast<int64_t>(i),
                                            static_cast<int64_t>(config.blocks.size()));
  }
  if (block.feed_forward == "moe") {
    MoeSizes sizes;
    sizes.experts = options.value("num_experts", int64_t{8});
    sizes.experts_per_token = options.value("num_experts_per_tok", int64_t{2});
    sizes.intermediate = options.value("moe_intermediate_size", config.ffn_size());
    sizes.shared_intermediate = options.value("shared_expert_intermediate_size", int64_t{0});
    sizes.normalise = options.value("norm_topk_prob", true);
    sizes.balance = options.value("router_aux_loss_coef", 0.001);
    return std::make_shared<MixtureOfExperts>(D, sizes);
  }
  return nullptr;
}

}  // namespace gdn
