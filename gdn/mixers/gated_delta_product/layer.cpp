// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_delta_product/layer.h"

#include <ATen/ops/constant_pad_nd.h>

namespace gdn {
namespace {

constexpr const char* kName = "gated_delta_product";
constexpr double kKeyShare = 0.75;

}  // namespace

GatedDeltaProduct::GatedDeltaProduct(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  steps_ = options.positive("num_householder");
  use_forget_gate_ = options.flag("use_forget_gate");
  allow_neg_eigval_ = options.flag("allow_neg_eigval");

  add_qkv(D, steps_);
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.HV * steps_);
  if (use_forget_gate_) {
    a_proj_ = add_linear(*this, "a_proj", D, sizes_.HV);
    decay_ = ScalarDecay(*this, sizes_.HV);
  }
  add_convolution(options);
  add_output(options, args, {"o_norm", options.flag("use_output_gate") ? "silu" : ""});
}

DeltaInputs GatedDeltaProduct::inputs(const at::Tensor& x, StateAccess& state) {
  const int64_t B = x.size(0), T = x.size(1);
  DeltaInputs in = project(x, state);  // k and v have T * steps_ tokens
  normalize_qk(in, naive_);
  in.beta = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_)
                .view({B, T * steps_, sizes_.HV});
  // The decay is the first step's, the query the last one's.
  if (use_forget_gate_) {
    const at::Tensor g = decay_.forward(a_proj_->forward(x), naive_);
    in.g =
        at::constant_pad_nd(g.unsqueeze(2), {0, 0, 0, steps_ - 1}).view({B, T * steps_, sizes_.HV});
  }
  in.q = at::constant_pad_nd(in.q.unsqueeze(2), {0, 0, 0, 0, steps_ - 1, 0})
             .view({B, T * steps_, sizes_.H, sizes_.K});
  in.steps = steps_;
  return in;
}

MixerInfo gated_delta_product_info() {
  return {
      kName,
      "Gated DeltaProduct",
      "arXiv 2502.10297",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined({{mode_option()},
              head_dim_options(kKeyShare, 2.0),
              {{"num_householder", 2, "delta steps per token, at least 1"},
               {"use_forget_gate", true, "decay the state once per token, as Gated DeltaNet does"},
               {"use_output_gate", true,
                "multiply the normed output by SiLU of a projection of the input"}},
              conv_options(),
              {neg_eigval_option(true), norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedDeltaProduct>(args);
      },
  };
}

}  // namespace gdn
