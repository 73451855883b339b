// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/delta_net/layer.h"

#include <ATen/ops/elu.h>
#include <ATen/ops/relu.h>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/options.h"

namespace gdn {
namespace {

constexpr const char* kName = "delta_net";

}  // namespace

DeltaNet::DeltaNet(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_width(options, D);
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  qk_activation_ = options.text("qk_activation", {"silu", "relu", "elu", "identity"});
  qk_norm_ = options.text("qk_norm", {"l2", "sum"});
  use_beta_ = options.flag("use_beta");
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  options.check(use_beta_ || !allow_neg_eigval_, "allow_neg_eigval needs use_beta");
  options.check(qk_norm_ == "l2" || qk_activation_ == "relu" || qk_activation_ == "elu",
                "qk_norm \"sum\" needs a qk_activation without negative values (relu, elu), got \"",
                qk_activation_, "\"");

  q_proj_ = add_linear(*this, "q_proj", D, sizes_.key_dim());
  k_proj_ = add_linear(*this, "k_proj", D, sizes_.key_dim());
  v_proj_ = add_linear(*this, "v_proj", D, sizes_.value_dim());
  if (use_beta_) b_proj_ = add_linear(*this, "b_proj", D, sizes_.H);
  convs_.emplace(*this, options,
                 QkvConvolution::Widths{sizes_.key_dim(), sizes_.key_dim(), sizes_.value_dim()},
                 qk_activation_ == "silu" ? Activation::kSilu : Activation::kNone);
  HeadOutput::Config output;
  if (options.flag("use_gate")) output.gate = "silu";
  output_.emplace(*this, D, sizes_, options.number_or("norm_eps", args.norm_eps), output);
}

State DeltaNet::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent", zero_recurrent_state(sequences, sizes_, options));
  convs_->add_zero_state(state, sequences, options);
  return state;
}

// SiLU is the convolutions' part.
at::Tensor DeltaNet::activate(const at::Tensor& qk) const {
  if (qk_activation_ == "relu") return at::relu(qk);
  return qk_activation_ == "elu" ? at::elu(qk) + 1.0 : qk;
}

at::Tensor DeltaNet::normalize(const at::Tensor& qk) const {
  if (qk_norm_ == "l2") return l2norm(qk, naive_);
  // relu may leave a vector of zeros
  const at::Tensor sum = qk.sum(-1, /*keepdim=*/true);
  return qk / (qk_activation_ == "relu" ? sum.clamp_min(1e-6) : sum);
}

at::Tensor DeltaNet::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  at::Tensor q = q_proj_->forward(x), k = k_proj_->forward(x), v = v_proj_->forward(x);
  convs_->forward(q, k, v, state, naive_);
  DeltaInputs in;
  in.q = normalize(activate(q).view({B, T, sizes_.H, sizes_.K}));
  in.k = normalize(activate(k).view({B, T, sizes_.H, sizes_.K}));
  in.v = v.view({B, T, sizes_.HV, sizes_.V});
  if (use_beta_) in.beta = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_);
  const at::Tensor o = run_delta_rule(in, delta_rule_form(mode_, T, naive_), state);
  return output_->forward(o, x, naive_);
}

MixerInfo delta_net_info() {
  return {
      kName,
      "DeltaNet",
      "arXiv 2406.06484",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           width_options(1.0, 1.0),
           {{"use_beta", true, "learn the write strength; false: 1"},
            {"use_gate", false, "multiply the normed output by SiLU of a projection of the input"}},
           conv_options(),
           {neg_eigval_option(),
            {"qk_activation", "silu", "activation of q and k: silu, relu, elu (plus 1), identity"},
            {"qk_norm", "l2", "norm of each head of q and k: l2, or sum (with relu or elu)"},
            norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<DeltaNet>(args);
      },
  };
}

}  // namespace gdn
