// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gla/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "gla";

}  // namespace

GatedLinearAttention::GatedLinearAttention(const MixerArgs& args) : GatedLinearMixer(kName, args) {
  normalizer_ = gate_normalizer(options_);
  if (options_.given("clamp_min")) {
    clamp_min_ = options_.number("clamp_min");
    options_.check(*clamp_min_ <= 0, "clamp_min must not be positive, got ", *clamp_min_);
  }
  gk_proj_ = register_module(
      "gk_proj", std::make_shared<LowRank>(args.hidden_size, options_.positive("gate_low_rank_dim"),
                                           num_kv_heads_ * sizes_.K, /*with_bias=*/true));
  add_rest(args);
}

at::Tensor GatedLinearAttention::decay(const at::Tensor& x) const {
  const at::Tensor raw = gk_proj_->forward(x).view({x.size(0), x.size(1), num_kv_heads_, sizes_.K});
  const at::Tensor g = log_sigmoid_gate(raw, normalizer_);
  return clamp_min_ ? g.clamp_min(*clamp_min_) : g;
}

MixerInfo gla_info() {
  return {
      kName,
      "Gated linear attention",
      "arXiv 2312.06635",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      gated_linear_options(
          {"expand_k", nullptr,
           "width of queries and keys, all heads, divided by hidden_size; default: 0.5, or 1 where "
           "hidden_size is odd"},
          {1.0, false},
          {{"gate_low_rank_dim", 16, "rank of the projection that makes the gate"},
           gate_normalizer_option(),
           {"clamp_min", nullptr, "smallest log decay of a token; default: no bound"}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedLinearAttention>(args);
      },
  };
}

}  // namespace gdn
