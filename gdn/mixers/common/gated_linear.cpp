// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/gated_linear.h"

#include <ATen/ops/log_sigmoid.h>

#include <utility>

namespace gdn {

GatedLinearMixer::GatedLinearMixer(const char* name, const MixerArgs& args)
    : DeltaMixer(name, args), options_(name, args) {
  sizes_ = sizes_by_width(options_, args.hidden_size);
  num_kv_heads_ = kv_heads(options_, sizes_.H);
  feature_map_ = options_.text("feature_map", {"identity", "relu", "elu", "silu"});
  add_qkv(args.hidden_size);
}

void GatedLinearMixer::add_rest(const MixerArgs& args) {
  add_convolution(options_, Activation::kSilu, Activation::kSilu, /*bare_activation=*/false);
  HeadOutput::Config config;
  if (options_.flag("use_output_gate")) {
    config.gate = options_.text("gate_fn", {"swish", "silu", "sigmoid"});
  }
  // fla names the norm after the gate that it is fused with.
  config.norm_name =
      config.gate == "swish" || config.gate == "silu" ? "g_norm_swish_gate" : "g_norm";
  add_output(options_, args, config);
}

DeltaInputs GatedLinearMixer::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  in.erase = "none";
  in.q = feature_map(feature_map_, in.q);
  in.k = feature_map(feature_map_, in.k);
  const at::Tensor g = decay(x);
  in.g = g.size(2) < sizes_.H ? g.repeat_interleave(sizes_.H / g.size(2), 2) : g;
  return in;
}

std::vector<MixerOption> gated_linear_options(MixerOption expand_k, GatedLinearDefaults defaults,
                                              std::vector<MixerOption> own) {
  return joined(
      {{mode_option()},
       width_options(std::move(expand_k), defaults.expand_v),
       {kv_heads_option(),
        {"feature_map", "identity", "of queries and keys: identity, relu, elu (plus 1), silu"}},
       conv_options(defaults.use_short_conv),
       {{"use_output_gate", true,
         "multiply the normed output by an activation of a projection of the input"},
        {"gate_fn", "swish", "that activation: swish (or silu), sigmoid"}},
       std::move(own),
       {norm_eps_option()}});
}

at::Tensor log_sigmoid_gate(const at::Tensor& raw, double normalizer) {
  return at::log_sigmoid(raw.to(ops::acc_type(raw.scalar_type()))) / normalizer;
}

MixerOption gate_normalizer_option() {
  return {"gate_logit_normalizer", 16,
          "the log-sigmoid of the gate is divided by this, which must be positive"};
}

double gate_normalizer(const Options& options) {
  const double normalizer = options.number("gate_logit_normalizer");
  options.check(normalizer > 0, "gate_logit_normalizer must be positive, got ", normalizer);
  return normalizer;
}

}  // namespace gdn
