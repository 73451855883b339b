// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_delta_net/layer.h"

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/options.h"

namespace gdn {
namespace {

constexpr const char* kName = "gated_delta_net";
constexpr double kKeyShare = 0.75;  // with expand_v = 2 and the gate: about 6 D^2 parameters

}  // namespace

GatedDeltaNet::GatedDeltaNet(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  erase_ = options.flag("erase");

  q_proj_ = add_linear(*this, "q_proj", D, sizes_.key_dim());
  k_proj_ = add_linear(*this, "k_proj", D, sizes_.key_dim());
  v_proj_ = add_linear(*this, "v_proj", D, sizes_.value_dim());
  a_proj_ = add_linear(*this, "a_proj", D, sizes_.HV);
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.HV);
  decay_ = ScalarDecay(*this, sizes_.HV);
  convs_.emplace(*this, options,
                 QkvConvolution::Widths{sizes_.key_dim(), sizes_.key_dim(), sizes_.value_dim()});
  HeadOutput::Config output;
  if (options.flag("use_gate")) output.gate = "silu";
  output_.emplace(*this, D, sizes_, options.number_or("norm_eps", args.norm_eps), output);
}

State GatedDeltaNet::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent", zero_recurrent_state(sequences, sizes_, options));
  convs_->add_zero_state(state, sequences, options);
  return state;
}

at::Tensor GatedDeltaNet::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  at::Tensor q = q_proj_->forward(x), k = k_proj_->forward(x), v = v_proj_->forward(x);
  convs_->forward(q, k, v, state, naive_);
  DeltaInputs in;
  in.q = l2norm(q.view({B, T, sizes_.H, sizes_.K}), naive_);
  in.k = l2norm(k.view({B, T, sizes_.H, sizes_.K}), naive_);
  in.v = v.view({B, T, sizes_.HV, sizes_.V});
  in.g = decay_.forward(a_proj_->forward(x), naive_);
  in.beta = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_);
  in.erase = erase_ ? "key" : "none";
  const at::Tensor o = run_delta_rule(in, delta_rule_form(mode_, T, naive_), state);
  return output_->forward(o, x, naive_);
}

MixerInfo gated_delta_net_info() {
  return {
      kName,
      "Gated DeltaNet",
      "arXiv 2412.06464",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           head_dim_options(kKeyShare, 2.0),
           {{"use_gate", true, "multiply the normed output by SiLU of a projection of the input"}},
           conv_options(),
           {neg_eigval_option(),
            norm_eps_option(),
            {"erase", true,
             "the delta rule's erase; false leaves S = exp(g) S + beta k v^T, for comparison"}}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedDeltaNet>(args);
      },
  };
}

}  // namespace gdn
