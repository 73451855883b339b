// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_delta_net_2/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "gated_delta_net_2";
constexpr double kKeyShare = 1.0;

}  // namespace

GatedDeltaNet2::GatedDeltaNet2(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  allow_neg_eigval_ = options.flag("allow_neg_eigval");

  add_qkv(D);
  decay_ = LowRankDecay(*this, sizes_, D);
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.key_dim());
  w_proj_ = add_linear(*this, "w_proj", D, sizes_.value_dim());
  decay_.add_parameters(*this, options, sizes_);
  add_convolution(options);
  add_output(options, args, {"o_norm", "sigmoid", sizes_.V});
}

DeltaInputs GatedDeltaNet2::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  in.q = l2norm(in.q, naive_);
  in.k = l2norm(in.k, naive_);
  in.g = decay_.forward(x, naive_);
  // Gates of single channels stand where the others have one beta: on the erase key and on v.
  const at::Tensor erase = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_);
  const at::Tensor write = write_strength(w_proj_->forward(x), false, naive_);
  in.erase = "own";
  in.a = in.k * erase.view(in.k.sizes()).to(in.k.scalar_type());
  in.v = in.v * write.view(in.v.sizes()).to(in.v.scalar_type());
  return in;
}

MixerInfo gated_delta_net_2_info() {
  return {
      kName,
      "Gated DeltaNet-2",
      "arXiv 2605.22791",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      low_rank_decay_options(kKeyShare),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedDeltaNet2>(args);
      },
  };
}

}  // namespace gdn
