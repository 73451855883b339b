// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/delta_net/layer.h"

#include <ATen/ops/elu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/options.h"
#include "gdn/ops/gate.h"

namespace gdn {
namespace {

constexpr const char* kName = "delta_net";

}  // namespace

DeltaNet::DeltaNet(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  const auto width = [&](const char* name) {
    const double expand = options.number(name), exact = static_cast<double>(D) * expand;
    const int64_t whole = std::llround(exact);
    options.check(whole >= 1 && std::abs(exact - static_cast<double>(whole)) <= 1e-5 * exact,
                  "hidden_size * ", name, " must be a whole number of at least 1, got ", D, " * ",
                  expand, " = ", exact);
    return whole;
  };
  const int64_t key_dim = width("expand_k"), value_dim = width("expand_v");
  // The most heads that leave each at least the default size and divide both widths.
  int64_t heads = std::max<int64_t>(1, D / default_head_dim(D));
  while (key_dim % heads != 0 || value_dim % heads != 0) --heads;
  num_heads_ = options.positive_or("num_heads", heads);
  options.check(key_dim % num_heads_ == 0 && value_dim % num_heads_ == 0,
                "num_heads must divide the widths of keys and values (", key_dim, " and ",
                value_dim, "), got ", num_heads_);
  head_k_dim_ = key_dim / num_heads_;
  head_v_dim_ = value_dim / num_heads_;
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  qk_activation_ = options.text("qk_activation", {"silu", "relu", "elu", "identity"});
  qk_norm_ = options.text("qk_norm", {"l2", "sum"});
  use_beta_ = options.flag("use_beta");
  use_gate_ = options.flag("use_gate");
  use_short_conv_ = options.flag("use_short_conv");
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  options.check(use_beta_ || !allow_neg_eigval_, "allow_neg_eigval needs use_beta");
  options.check(qk_norm_ == "l2" || qk_activation_ == "relu" || qk_activation_ == "elu",
                "qk_norm \"sum\" needs a qk_activation without negative values (relu, elu), got \"",
                qk_activation_, "\"");
  const int64_t conv_size = options.conv_size();
  const bool conv_bias = options.flag("conv_bias");

  q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, key_dim));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(D, key_dim));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(D, value_dim));
  if (use_beta_) b_proj_ = register_module("b_proj", std::make_shared<Linear>(D, num_heads_));
  if (use_short_conv_) {
    const Activation qk = qk_activation_ == "silu" ? Activation::kSilu : Activation::kNone;
    auto conv = [&](int64_t channels, Activation activation) {
      return std::make_shared<ShortConvolution>(channels, conv_size, conv_bias, activation);
    };
    q_conv1d_ = register_module("q_conv1d", conv(key_dim, qk));
    k_conv1d_ = register_module("k_conv1d", conv(key_dim, qk));
    v_conv1d_ = register_module("v_conv1d", conv(value_dim, Activation::kSilu));
  }
  if (use_gate_) g_proj_ = register_module("g_proj", std::make_shared<Linear>(D, value_dim));
  const double eps = options.number_or("norm_eps", args.norm_eps);
  o_norm_ = register_module("o_norm", std::make_shared<RmsNorm>(head_v_dim_, eps));
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(value_dim, D));
}

State DeltaNet::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent",
            zero_recurrent_state(sequences, num_heads_, head_k_dim_, head_v_dim_, options));
  if (use_short_conv_) {
    state.set("conv_q", q_conv1d_->zero_state(sequences, options));
    state.set("conv_k", k_conv1d_->zero_state(sequences, options));
    state.set("conv_v", v_conv1d_->zero_state(sequences, options));
  }
  return state;
}

// SiLU belongs to the convolution where there is one.
at::Tensor DeltaNet::activate(const at::Tensor& qk) const {
  if (qk_activation_ == "silu") return use_short_conv_ ? qk : at::silu(qk);
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
  if (use_short_conv_) {
    q = q_conv1d_->forward(q, state, "conv_q", naive_);
    k = k_conv1d_->forward(k, state, "conv_k", naive_);
    v = v_conv1d_->forward(v, state, "conv_v", naive_);
  } else {
    v = at::silu(v);
  }
  q = normalize(activate(q).view({B, T, num_heads_, head_k_dim_}));
  k = normalize(activate(k).view({B, T, num_heads_, head_k_dim_}));
  v = v.view({B, T, num_heads_, head_v_dim_});
  ops::OptionalTensor beta;  // [B,T,H]; absent: 1
  if (use_beta_) {
    const at::Tensor b = b_proj_->forward(x);
    beta = naive_
               ? at::sigmoid(b.to(ops::acc_type(x.scalar_type()))) * (allow_neg_eigval_ ? 2.0 : 1.0)
               : ops::beta_sigmoid(b, allow_neg_eigval_);
  }
  at::Tensor o = delta_rule_with_state(q, k, v, std::nullopt, beta, "key",
                                       delta_rule_form(mode_, T, naive_), state);
  if (use_gate_) {
    o = o_norm_->forward_gated(o, g_proj_->forward(x).view_as(o), naive_);
  } else {
    o = o_norm_->forward(o, naive_);
  }
  return o_proj_->forward(o.view({B, T, num_heads_ * head_v_dim_}));
}

MixerInfo delta_net_info() {
  return {
      kName,
      "DeltaNet",
      "arXiv 2406.06484",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      {
          {"mode", "chunk",
           "form for whole sequences: chunk, or fused_recurrent (token by token); without "
           "gradients "
           "short inputs always take the latter"},
          {"num_heads", nullptr,
           "heads; default: the most that divide the widths of keys and values and leave each the "
           "size hidden_size / 8 rounded down to a power of two, from 64 to 256"},
          {"expand_k", 1.0, "width of queries and keys, all heads, divided by hidden_size"},
          {"expand_v", 1.0, "width of values, all heads, divided by hidden_size"},
          {"use_beta", true, "learn the write strength; false: 1"},
          {"use_gate", false, "multiply the normed output by SiLU of a projection of the input"},
          {"use_short_conv", true, "causal convolution over q, k and v"},
          {"conv_size", 4, "width of that convolution, at most 8"},
          {"conv_bias", false, "give it a bias"},
          {"allow_neg_eigval", false,
           "write strength beta in (0,2) instead of (0,1), so that the transition may flip signs"},
          {"qk_activation", "silu", "activation of q and k: silu, relu, elu (plus 1), identity"},
          {"qk_norm", "l2", "norm of each head of q and k: l2, or sum (with relu or elu)"},
          {"norm_eps", nullptr, "epsilon of the output norm; default: that of the model"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<DeltaNet>(args);
      },
  };
}

}  // namespace gdn
