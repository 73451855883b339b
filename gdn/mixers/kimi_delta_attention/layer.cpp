// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/kimi_delta_attention/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "kimi_delta_attention";
constexpr double kKeyShare = 1.0;

}  // namespace

KimiDeltaAttention::KimiDeltaAttention(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  allow_neg_eigval_ = options.flag("allow_neg_eigval");

  add_qkv(D);
  f_proj_ = register_module("f_proj",
                            std::make_shared<LowRank>(D, sizes_.V, sizes_.HV * sizes_.K, false));
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.HV);
  decay_ = ChannelDecay(*this, options, sizes_.HV, sizes_.K);
  add_convolution(options);
  add_output(options, args, {"o_norm", "sigmoid", sizes_.V});
}

DeltaInputs KimiDeltaAttention::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  in.q = l2norm(in.q, naive_);
  in.k = l2norm(in.k, naive_);
  in.g = decay_.forward(f_proj_->forward(x), naive_);
  in.beta = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_);
  return in;
}

MixerInfo kimi_delta_attention_info() {
  return {
      kName,
      "Kimi Delta Attention",
      "arXiv 2510.26692",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined({{mode_option()},
              head_dim_options(kKeyShare, 1.0),
              conv_options(),
              {neg_eigval_option()},
              safe_gate_options(),
              {norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<KimiDeltaAttention>(args);
      },
  };
}

}  // namespace gdn
