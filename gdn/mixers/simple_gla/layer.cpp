// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/simple_gla/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "simple_gla";

}  // namespace

SimpleGla::SimpleGla(const MixerArgs& args) : GatedLinearMixer(kName, args) {
  normalizer_ = gate_normalizer(options_);
  gk_proj_ = add_linear(*this, "gk_proj", args.hidden_size, sizes_.H, /*with_bias=*/true);
  add_rest(args);
}

at::Tensor SimpleGla::decay(const at::Tensor& x) const {
  return log_sigmoid_gate(gk_proj_->forward(x), normalizer_);
}

MixerInfo simple_gla_info() {
  return {
      kName,
      "Simple GLA",
      "arXiv 2312.06635",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      gated_linear_options(expand_k_option(1.0), {1.0, true}, {gate_normalizer_option()}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<SimpleGla>(args);
      },
  };
}

}  // namespace gdn
