// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mamba2/layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/options.h"
#include "gdn/ops/gate.h"
#include "gdn/ops/norm.h"
#include "gdn/ops/swiglu.h"

namespace gdn {
namespace {

constexpr const char* kName = "mamba2";

// The largest divisor of `width` that is at most 64.
int64_t default_mamba_head_dim(int64_t width) {
  int64_t size = std::min<int64_t>(64, width);
  while (width % size != 0) --size;
  return size;
}

}  // namespace

Mamba2::GroupedNorm::GroupedNorm(int64_t size, int64_t groups, double eps)
    : groups_(groups), eps_(eps) {
  weight = register_parameter("weight", at::ones({size}, at::kFloat));
}

at::Tensor Mamba2::GroupedNorm::forward(const at::Tensor& x, bool naive) const {
  if (groups_ == 1 && !naive) return ops::rms_norm(x, weight, eps_);
  const int64_t size = x.size(-1) / groups_;
  const at::Tensor parts = x.unflatten(-1, {groups_, size});
  const at::Tensor ones = at::ones({size}, x.options());
  const at::Tensor normed =
      naive ? naive::rms_norm(parts, ones, eps_) : ops::rms_norm(parts, ones, eps_);
  return normed.flatten(-2) * weight.to(x.scalar_type());
}

Mamba2::Mamba2(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size, width = options.positive("expand") * D;
  head_dim_ = options.positive_or("head_dim", default_mamba_head_dim(width));
  options.check(width % head_dim_ == 0, "head_dim must divide expand * hidden_size (", width,
                "), got ", head_dim_);
  num_heads_ = width / head_dim_;
  states_ = options.positive("state_size");
  groups_ = options.positive("n_groups");
  options.check(num_heads_ % groups_ == 0, "n_groups must divide the number of heads (", num_heads_,
                "), got ", groups_);
  const int64_t norm_groups = options.positive_or("norm_groups", groups_);
  options.check(width % norm_groups == 0, "norm_groups must divide expand * hidden_size (", width,
                "), got ", norm_groups);
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  const bool bias = options.flag("use_bias");
  const int64_t convolved = width + 2 * groups_ * states_;
  in_proj_ =
      register_module("in_proj", std::make_shared<Linear>(D, width + convolved + num_heads_, bias));
  conv1d_ = register_module(
      "conv1d", std::make_shared<ShortConvolution>(convolved, options.conv_size(),
                                                   options.flag("conv_bias"), Activation::kSilu));
  {
    c10::NoGradGuard no_grad;
    A_log_ = at::empty({num_heads_}, at::kFloat).uniform_(1, 16).log_();
    const at::Tensor dt = at::empty({num_heads_}, at::kFloat)
                              .uniform_(std::log(0.001), std::log(0.1))
                              .exp_()
                              .clamp_min_(1e-4);
    dt_bias_ = dt + at::log(-at::expm1(-dt));
  }
  A_log_ = register_parameter("A_log", A_log_);
  dt_bias_ = register_parameter("dt_bias", dt_bias_);
  D_ = register_parameter("D", at::ones({num_heads_}, at::kFloat));
  norm_ = register_module(
      "norm", std::make_shared<GroupedNorm>(width, norm_groups,
                                            options.number_or("norm_eps", args.norm_eps)));
  out_proj_ = register_module("out_proj", std::make_shared<Linear>(width, D, bias));
}

State Mamba2::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent",
            zero_recurrent_state(sequences, {groups_, num_heads_, states_, head_dim_}, options));
  state.set("conv", conv1d_->zero_state(sequences, options));
  return state;
}

at::Tensor Mamba2::forward(const at::Tensor& input, const Context& ctx) {
  StateAccess state(kName, input, ctx, *this);
  const int64_t B = input.size(0), T = input.size(1);
  const int64_t width = num_heads_ * head_dim_, keys = groups_ * states_;
  const at::Tensor parts = in_proj_->forward(input);  // z, then x, B, C, then dt
  const at::Tensor z = parts.narrow(2, 0, width);
  const at::Tensor xBC =
      conv1d_->forward(parts.narrow(2, width, width + 2 * keys), state, "conv", naive_);
  const at::Tensor x = xBC.narrow(2, 0, width).view({B, T, num_heads_, head_dim_});
  const at::Tensor raw = parts.narrow(2, 2 * width + 2 * keys, num_heads_);  // dt [B,T,H]
  const at::ScalarType acc = ops::acc_type(input.scalar_type());
  const at::Tensor dt = at::softplus(raw.to(acc) + dt_bias_.to(acc));
  DeltaInputs in;
  in.q = xBC.narrow(2, width + keys, keys).view({B, T, groups_, states_});
  in.k = xBC.narrow(2, width, keys).view({B, T, groups_, states_});
  in.v = x * dt.to(x.scalar_type()).unsqueeze(-1);
  in.g = naive_ ? -A_log_.to(acc).exp() * dt : ops::gdn_gate(raw, A_log_, dt_bias_);
  in.erase = "none";
  in.scale = 1.0;
  at::Tensor y = run_delta_rule(in, delta_rule_form(mode_, T, naive_), state);
  y = (y + D_.to(x.scalar_type()).unsqueeze(-1) * x).view({B, T, width});
  y = norm_->forward(naive_ ? at::silu(z) * y : ops::swiglu(z, y), naive_);
  return out_proj_->forward(y);
}

MixerInfo mamba2_info() {
  return {
      kName,
      "Mamba-2",
      "arXiv 2405.21060",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      {
          mode_option(),
          {"expand", 2, "channels divided by hidden_size"},
          {"head_dim", nullptr,
           "channels of a head, a divisor of expand * hidden_size, which gives the number of "
           "heads; "
           "default: 64, or the largest divisor below that"},
          {"state_size", 128, "states of each channel, the length of B and C"},
          {"n_groups", 1, "how many B and C there are; heads share them group by group"},
          {"norm_groups", nullptr,
           "parts that the output norm takes for themselves (1: Hugging Face); default: n_groups"},
          {"conv_size", 4, "width of the causal convolution over x, B and C, at most 8"},
          {"conv_bias", true, "give it a bias"},
          {"use_bias", false, "biases in in_proj and out_proj"},
          norm_eps_option(),
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<Mamba2>(args);
      },
  };
}

}  // namespace gdn
