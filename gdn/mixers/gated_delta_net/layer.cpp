// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_delta_net/layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/log.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/options.h"
#include "gdn/ops/gate.h"

namespace gdn {
namespace {

constexpr const char* kName = "gated_delta_net";

// log A with A from U(0,16). An exact 0 would give -inf, which training never leaves.
at::Tensor initial_a_log(int64_t heads) {
  return at::empty({heads}, at::kFloat).uniform_(0, 16).clamp_min_(1e-4).log_();
}

// The bias whose softplus is a step size drawn log-uniformly from [0.001, 0.1].
at::Tensor initial_dt_bias(int64_t heads) {
  const at::Tensor dt = at::empty({heads}, at::kFloat)
                            .uniform_(std::log(0.001), std::log(0.1))
                            .exp_()
                            .clamp_min_(1e-4);
  return dt + at::log(-at::expm1(-dt));
}

}  // namespace

GatedDeltaNet::GatedDeltaNet(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  head_dim_ = options.positive_or("head_dim", default_head_dim(D));
  const int64_t heads =
      std::llround(0.75 * static_cast<double>(D) / static_cast<double>(head_dim_));
  num_heads_ = options.positive_or("num_heads", std::max<int64_t>(heads, 1));
  num_v_heads_ = options.positive_or("num_v_heads", num_heads_);
  options.check(num_v_heads_ % num_heads_ == 0, "num_v_heads must be a multiple of num_heads (",
                num_heads_, "), got ", num_v_heads_);
  const double expand_v = options.number("expand_v");
  const double v_dim = static_cast<double>(head_dim_) * expand_v;
  head_v_dim_ = std::llround(v_dim);
  options.check(
      head_v_dim_ >= 1 && std::abs(v_dim - static_cast<double>(head_v_dim_)) <= 1e-5 * v_dim,
      "head_dim * expand_v must be a whole number of at least 1, got ", head_dim_, " * ", expand_v,
      " = ", v_dim);
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  use_gate_ = options.flag("use_gate");
  use_short_conv_ = options.flag("use_short_conv");
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  erase_ = options.flag("erase");
  const int64_t conv_size = options.conv_size();
  const bool conv_bias = options.flag("conv_bias");
  const int64_t key_dim = num_heads_ * head_dim_, value_dim = num_v_heads_ * head_v_dim_;

  q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, key_dim));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(D, key_dim));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(D, value_dim));
  a_proj_ = register_module("a_proj", std::make_shared<Linear>(D, num_v_heads_));
  b_proj_ = register_module("b_proj", std::make_shared<Linear>(D, num_v_heads_));
  {
    c10::NoGradGuard no_grad;
    A_log_ = initial_a_log(num_v_heads_);
    dt_bias_ = initial_dt_bias(num_v_heads_);
  }
  A_log_ = register_parameter("A_log", A_log_);
  dt_bias_ = register_parameter("dt_bias", dt_bias_);
  if (use_short_conv_) {
    auto conv = [&](int64_t channels) {
      return std::make_shared<ShortConvolution>(channels, conv_size, conv_bias, Activation::kSilu);
    };
    q_conv1d_ = register_module("q_conv1d", conv(key_dim));
    k_conv1d_ = register_module("k_conv1d", conv(key_dim));
    v_conv1d_ = register_module("v_conv1d", conv(value_dim));
  }
  if (use_gate_) g_proj_ = register_module("g_proj", std::make_shared<Linear>(D, value_dim));
  const double eps = options.number_or("norm_eps", args.norm_eps);
  o_norm_ = register_module("o_norm", std::make_shared<RmsNorm>(head_v_dim_, eps));
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(value_dim, D));
}

State GatedDeltaNet::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent",
            zero_recurrent_state(sequences, num_v_heads_, head_dim_, head_v_dim_, options));
  if (use_short_conv_) {
    state.set("conv_q", q_conv1d_->zero_state(sequences, options));
    state.set("conv_k", k_conv1d_->zero_state(sequences, options));
    state.set("conv_v", v_conv1d_->zero_state(sequences, options));
  }
  return state;
}

at::Tensor GatedDeltaNet::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  at::Tensor q = q_proj_->forward(x), k = k_proj_->forward(x), v = v_proj_->forward(x);
  if (use_short_conv_) {
    q = q_conv1d_->forward(q, state, "conv_q", naive_);
    k = k_conv1d_->forward(k, state, "conv_k", naive_);
    v = v_conv1d_->forward(v, state, "conv_v", naive_);
  } else {
    q = at::silu(q);
    k = at::silu(k);
    v = at::silu(v);
  }
  q = l2norm(q.view({B, T, num_heads_, head_dim_}), naive_);
  k = l2norm(k.view({B, T, num_heads_, head_dim_}), naive_);
  v = v.view({B, T, num_v_heads_, head_v_dim_});
  const at::Tensor b = b_proj_->forward(x), a = a_proj_->forward(x);  // [B,T,HV]
  at::Tensor beta, g;
  if (naive_) {
    const at::ScalarType acc = ops::acc_type(x.scalar_type());
    beta = at::sigmoid(b.to(acc)) * (allow_neg_eigval_ ? 2.0 : 1.0);
    g = naive::gdn_gate(a.to(acc), A_log_.to(acc), dt_bias_.to(acc));
  } else {
    beta = ops::beta_sigmoid(b, allow_neg_eigval_);
    g = ops::gdn_gate(a, A_log_, dt_bias_);
  }
  at::Tensor o = delta_rule_with_state(q, k, v, g, beta, erase_ ? "key" : "none",
                                       delta_rule_form(mode_, T, naive_), state);
  if (use_gate_) {
    o = o_norm_->forward_gated(o, g_proj_->forward(x).view_as(o), naive_);
  } else {
    o = o_norm_->forward(o, naive_);
  }
  return o_proj_->forward(o.view({B, T, num_v_heads_ * head_v_dim_}));
}

MixerInfo gated_delta_net_info() {
  return {
      kName,
      "Gated DeltaNet",
      "arXiv 2412.06464",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      {
          {"mode", "chunk",
           "form for whole sequences: chunk, or fused_recurrent (token by token); without "
           "gradients "
           "short inputs always take the latter"},
          {"head_dim", nullptr,
           "key size K of a head; default: hidden_size / 8 rounded down to a power of two, from 64 "
           "to 256, at most hidden_size"},
          {"num_heads", nullptr,
           "query and key heads H; default: 0.75 * hidden_size / head_dim, rounded, at least 1"},
          {"num_v_heads", nullptr, "value heads HV, a multiple of num_heads; default: num_heads"},
          {"expand_v", 2.0, "value size of a head divided by head_dim"},
          {"use_gate", true, "multiply the normed output by SiLU of a projection of the input"},
          {"use_short_conv", true, "causal convolution over q, k and v before SiLU"},
          {"conv_size", 4, "width of that convolution, at most 8"},
          {"conv_bias", false, "give it a bias"},
          {"allow_neg_eigval", false,
           "write strength beta in (0,2) instead of (0,1), so that the transition may flip signs"},
          {"norm_eps", nullptr, "epsilon of the output norm; default: that of the model"},
          {"erase", true,
           "the delta rule's erase; false leaves S = exp(g) S + beta k v^T, for comparison"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedDeltaNet>(args);
      },
  };
}

}  // namespace gdn
