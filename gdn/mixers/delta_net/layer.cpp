// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/delta_net/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "delta_net";

}  // namespace

DeltaNet::DeltaNet(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_width(options, D);
  qk_activation_ = options.text("qk_activation", {"silu", "relu", "elu", "identity"});
  qk_norm_ = options.text("qk_norm", {"l2", "sum"});
  use_beta_ = options.flag("use_beta");
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  options.check(use_beta_ || !allow_neg_eigval_, "allow_neg_eigval needs use_beta");
  options.check(qk_norm_ == "l2" || qk_activation_ == "relu" || qk_activation_ == "elu",
                "qk_norm \"sum\" needs a qk_activation without negative values (relu, elu), got \"",
                qk_activation_, "\"");

  add_qkv(D);
  if (use_beta_) b_proj_ = add_linear(*this, "b_proj", D, sizes_.H);
  add_convolution(options, qk_activation_ == "silu" ? Activation::kSilu : Activation::kNone);
  add_output(options, args, {"o_norm", options.flag("use_gate") ? "silu" : ""});
}

// The activation, where it is not the convolutions' SiLU, and the norm by the sum of each head.
at::Tensor DeltaNet::activate(const at::Tensor& qk) const {
  const at::Tensor x = qk_activation_ == "silu" ? qk : feature_map(qk_activation_, qk);
  if (qk_norm_ == "l2") return x;  // normalize_qk follows
  // relu may leave a vector of zeros
  const at::Tensor sum = x.sum(-1, /*keepdim=*/true);
  return x / (qk_activation_ == "relu" ? sum.clamp_min(1e-6) : sum);
}

DeltaInputs DeltaNet::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  in.q = activate(in.q);
  in.k = activate(in.k);
  if (qk_norm_ == "l2") normalize_qk(in, naive_);
  if (use_beta_) in.beta = write_strength(b_proj_->forward(x), allow_neg_eigval_, naive_);
  return in;
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
           width_options(expand_k_option(1.0), 1.0),
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
