// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/ttt/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/options.h"
#include "gdn/mixers/common/positions.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr double kInitialStd = 0.02;

at::Tensor normal_parameter(at::IntArrayRef sizes) {
  c10::NoGradGuard no_grad;
  return at::empty(sizes, at::kFloat).normal_(0.0, kInitialStd);
}

}  // namespace

Ttt::Ttt(const char* name, bool mlp, const MixerArgs& args) : name_(name) {
  const Options options(name, args);
  const int64_t D = args.hidden_size;
  if (!args.options.at("num_heads").is_null() && args.options.at("head_dim").is_null()) {
    num_heads_ = options.positive("num_heads");
    options.check(D % num_heads_ == 0, "num_heads must divide hidden_size (", D,
                  ") unless head_dim is given, got ", num_heads_);
    head_dim_ = options.positive_or("head_dim", D / num_heads_);
  } else {
    head_dim_ = options.positive_or("head_dim", std::min<int64_t>(64, D + D % 2));
    const int64_t heads = std::llround(static_cast<double>(D) / static_cast<double>(head_dim_));
    num_heads_ = options.positive_or("num_heads", std::max<int64_t>(heads, 1));
  }
  rope_theta_ = options.number("rope_theta");
  options.check(rope_theta_ >= 0, "rope_theta must be positive, or 0 for no positions, got ",
                rope_theta_);
  options.check(rope_theta_ == 0 || head_dim_ % 2 == 0,
                "head_dim must be even for rotary positions, got ", head_dim_);
  base_lr_ = options.number("base_lr");
  options.check(base_lr_ > 0, "base_lr must be positive, got ", base_lr_);
  norm_eps_ = options.number("norm_eps");
  options.check(norm_eps_ > 0, "norm_eps must be positive, got ", norm_eps_);
  share_qk_ = options.flag("share_qk");
  inner_norm_ = options.flag("inner_norm");
  config_.rule = "ttt";
  config_.activation = "gelu";
  config_.depth = mlp ? 2 : 1;
  if (mlp) {
    const double width = options.number("expansion") * static_cast<double>(head_dim_);
    config_.hidden = std::llround(width);
    options.check(config_.hidden >= 1, "expansion * head_dim must be at least 1, got ", width);
  }
  config_.bias = options.flag("inner_bias");
  config_.chunk = options.positive("mini_batch_size");
  config_.norm_eps = norm_eps_;

  const int64_t width = num_heads_ * head_dim_;
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, width));
  if (share_qk_) {
    const int64_t conv_size = options.conv_size();
    auto conv = [&] {
      return std::make_shared<ShortConvolution>(width, conv_size, /*with_bias=*/true,
                                                Activation::kNone);
    };
    conv_q_ = register_module("conv_q", conv());
    conv_k_ = register_module("conv_k", conv());
  } else {
    k_proj_ = register_module("k_proj", std::make_shared<Linear>(D, width));
  }
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(D, width));
  start_ = register_module(
      "start", std::make_shared<MemoryWeights>(num_heads_, head_dim_, config_, kInitialStd));
  lr_weight_ = register_parameter("learnable_ttt_lr_weight", normal_parameter({num_heads_, 1, D}));
  lr_bias_ = register_parameter("learnable_ttt_lr_bias", at::zeros({num_heads_, 1}));
  token_idx_ = register_parameter("learnable_token_idx", at::zeros({config_.chunk}));
  if (inner_norm_) {
    norm_weight_ = register_parameter("ttt_norm_weight", at::ones({num_heads_, head_dim_}));
    norm_bias_ = register_parameter("ttt_norm_bias", at::zeros({num_heads_, head_dim_}));
  }
  post_weight_ = register_parameter("post_norm_weight", at::ones({width}));
  post_bias_ = register_parameter("post_norm_bias", at::zeros({width}));
  if (options.flag("use_gate")) {
    g_proj_ = register_module("g_proj", std::make_shared<Linear>(D, width));
  }
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(width, D));
}

State Ttt::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  add_memory_state(state, sequences, num_heads_, head_dim_, config_, /*eta=*/false, options);
  if (share_qk_) {
    state.set("conv_q", conv_q_->zero_state(sequences, options));
    state.set("conv_k", conv_k_->zero_state(sequences, options));
  }
  return state;
}

// Rotary positions inside the mini-batch. Every sequence has its own position, so the tokens of all
// of them stand in one row.
at::Tensor Ttt::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(name_, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  const at::ScalarType acc = ops::acc_type(x.scalar_type());
  at::Tensor q = q_proj_->forward(x), k;
  if (share_qk_) {
    k = conv_k_->forward(q, state, "conv_k", naive_);
    q = conv_q_->forward(q, state, "conv_q", naive_);
  } else {
    k = k_proj_->forward(x);
  }
  auto heads = [&](const at::Tensor& t) { return t.view({B, T, num_heads_, head_dim_}); };
  ops::MemoryTensors in;
  in.q = heads(q);
  in.k = heads(k);
  in.v = heads(v_proj_->forward(x));
  if (rope_theta_ > 0 && T > 0) {
    const at::Tensor positions =
        token_positions(state, tokens_before(state), T).remainder(config_.chunk);
    in.q = rotated(in.q, positions, rope_theta_, naive_);
    in.k = rotated(in.k, positions, rope_theta_, naive_);
  }
  const at::Tensor lr = at::linear(x, lr_weight_.squeeze(1).to(x.scalar_type())).to(acc) +
                        lr_bias_.squeeze(1).to(acc);  // [B,T,H]
  in.rate = at::sigmoid(lr) * (base_lr_ / static_cast<double>(head_dim_));
  const at::Tensor counts = at::arange(1, config_.chunk + 1, at::TensorOptions(acc));
  in.tau = (counts.reciprocal() + token_idx_.to(acc)).clamp_min(0);
  if (inner_norm_) {
    in.norm_weight = norm_weight_.to(acc);
    in.norm_bias = norm_bias_.to(acc);
  }
  const at::Tensor o = memory_with_state(in, config_, {start_->flat().to(acc), {}}, state, naive_);
  const int64_t width = num_heads_ * head_dim_;
  at::Tensor y = at::layer_norm(o.reshape({B, T, width}), {width}, post_weight_.to(x.scalar_type()),
                                post_bias_.to(x.scalar_type()), norm_eps_);
  if (g_proj_ != nullptr) y = y * at::gelu(g_proj_->forward(x), "tanh");
  return o_proj_->forward(y);
}

namespace {

MixerInfo ttt_info(const char* name, const char* title, bool mlp,
                   std::shared_ptr<Mixer> (*make)(const MixerArgs&)) {
  MixerInfo info = {
      name,
      title,
      "arXiv 2407.04620",
      {"naive", "chunk", "step"},
      {"cpu"},
      {
          {"num_heads", nullptr, "heads; default: hidden_size / head_dim, rounded, at least 1"},
          {"head_dim", nullptr,
           "size of a head; default: hidden_size / num_heads where that is given, else 64 (at most "
           "hidden_size, made even)"},
          {"mini_batch_size", 16,
           "tokens whose inner gradients are taken at the same weights; part of the model"},
          {"base_lr", mlp ? 0.1 : 1.0,
           "inner learning rate before the token's gate and 1 / head_dim"},
          {"inner_norm", true,
           "inner model x + LN(z(x)) as in the paper; false: z(x), trained towards v"},
          {"inner_bias", true, "biases in the inner model"},
          {"rope_theta", 10000.0,
           "base of the rotary positions inside the mini-batch; 0: no positions"},
          {"share_qk", false,
           "q and k are two convolutions of one projection (the paper's Mamba backbone)"},
          {"conv_size", 4, "width of these convolutions, at most 8"},
          {"use_gate", false, "multiply the normed output by GELU of a projection of the input"},
          {"norm_eps", 1e-6, "epsilon of the inner and of the output LayerNorm"},
      },
      make,
  };
  if (mlp) info.options.push_back({"expansion", 4.0, "inner hidden width divided by head_dim"});
  return info;
}

}  // namespace

MixerInfo ttt_linear_info() {
  return ttt_info("ttt_linear", "TTT-Linear", false,
                  [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
                    return std::make_shared<Ttt>("ttt_linear", false, args);
                  });
}

MixerInfo ttt_mlp_info() {
  return ttt_info("ttt_mlp", "TTT-MLP", true, [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
    return std::make_shared<Ttt>("ttt_mlp", true, args);
  });
}

}  // namespace gdn
