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
  decay_ = LowRankDecay(*this, sizes_, D);
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.HV);
  decay_.add_parameters(*this, options, sizes_);
  add_convolution(options);
  add_output(options, args, {"o_norm", "sigmoid", sizes_.V});
}

DeltaInputs KimiDeltaAttention::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  normalize_qk(in, naive_);
  in.g = decay_.forward(x, naive_);
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
      low_rank_decay_options(kKeyShare),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<KimiDeltaAttention>(args);
      },
  };
}

}  // namespace gdn
