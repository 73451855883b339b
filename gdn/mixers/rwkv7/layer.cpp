// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/rwkv7/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/token_shift.h"
#include "gdn/ops/norm.h"

namespace gdn {
namespace {

constexpr const char* kName = "rwkv7";
// How much of the token before each input takes, by channel.
enum Mix : size_t { kR, kW, kK, kV, kA, kG };
constexpr std::array<const char*, 6> kMixes = {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g"};
const double kDecayRate = std::exp(-0.5);
constexpr double kKeyNormEps = 1e-12;

// The largest divisor of hidden_size up to 64.
int64_t default_rwkv_head(int64_t hidden_size) {
  int64_t size = std::min<int64_t>(64, hidden_size);
  while (hidden_size % size != 0) --size;
  return size;
}

// fla's ranks: a multiple of 32 near factor * sqrt(hidden_size).
int64_t default_rank(double factor, int64_t hidden_size) {
  const double exact = factor * std::sqrt(static_cast<double>(hidden_size));
  return std::max<int64_t>(32, std::lround(exact / 32) * 32);
}

// Fills `weight` [out,in] with orthogonal rows or columns, times `gain`.
void make_orthogonal(at::Tensor weight, double gain) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const at::Tensor tall =
      at::empty({std::max(rows, columns), std::min(rows, columns)}, at::kFloat).normal_();
  auto [q, r] = at::linalg_qr(tall);
  const at::Tensor fixed = q * r.diagonal().sign();  // the uniform distribution
  weight.copy_((rows < columns ? fixed.t() : fixed) * gain);
}

}  // namespace

Lora::Lora(int64_t in_features, int64_t rank, int64_t out_features, Inner inner,
           const at::Tensor& bias)
    : inner_(inner) {
  const auto lora = register_module("lora", std::make_shared<torch::nn::Module>());
  down_ = add_linear(*lora, "0", in_features, rank);
  up_ = add_linear(*lora, "2", rank, out_features, bias.defined());
  c10::NoGradGuard no_grad;
  down_->weight.zero_();
  const double gain = rank > out_features
                          ? std::sqrt(static_cast<double>(rank) / static_cast<double>(out_features))
                          : 1.0;
  make_orthogonal(up_->weight, 0.1 * gain);
  if (bias.defined()) up_->bias.copy_(bias);
  down_->keeps_initialisation = up_->keeps_initialisation = true;
}

at::Tensor Lora::forward(const at::Tensor& x) {
  at::Tensor h = down_->forward(x);
  if (inner_ == Inner::kTanh) h = at::tanh(h);
  if (inner_ == Inner::kSigmoid) h = at::sigmoid(h);
  return up_->forward(h);
}

Rwkv7::Rwkv7(const MixerArgs& args) : layer_(args.layer_idx) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  const int64_t head = options.positive_or("head_dim", default_rwkv_head(D));
  options.check(D % head == 0, "head_dim must divide hidden_size (", D, "), got ", head);
  sizes_ = {D / head, D / head, head, head};
  mode_ = options.text("mode", {"chunk", "fused_recurrent"});
  norm_eps_ = static_cast<double>(head) * options.number_or("norm_eps", args.norm_eps);

  const double factor = static_cast<double>(head) / 64;
  const auto rank = [&](const char* name, double scale) {
    return options.positive_or(name, default_rank(scale, D));
  };
  for (size_t i = 0; i < kMixes.size(); ++i) {
    mixes_[i] = register_parameter(kMixes[i], at::zeros({1, 1, D}));
  }
  k_k_ = register_parameter("k_k", at::zeros({D}));
  k_a_ = register_parameter("k_a", at::zeros({D}));
  r_k_ = register_parameter("r_k", at::zeros({sizes_.H, head}));
  r_proj_ = add_linear(*this, "r_proj", D, D);
  k_proj_ = add_linear(*this, "k_proj", D, D);
  v_proj_ = add_linear(*this, "v_proj", D, D);
  o_proj_ = add_linear(*this, "o_proj", D, D);

  // Where a channel stands among all, from -0.5 to 0.5, and within its head, from -1 to 1, bent.
  const at::Tensor n = at::arange(D, at::kFloat);
  const at::Tensor linear = n / static_cast<double>(std::max<int64_t>(D - 1, 1)) - 0.5;
  const double middle = static_cast<double>(head - 1) / 2;
  at::Tensor zigzag = (n.remainder(head) - middle) / std::max(middle, 0.5);
  zigzag = zigzag * zigzag.abs();
  const double along = args.num_layers > 1
                           ? static_cast<double>(layer_) / static_cast<double>(args.num_layers - 1)
                           : 0;
  const at::Tensor decay = -6 + 6 * (linear + 0.5).pow(1 + std::pow(along, 0.3));
  const auto add_lora = [&](const char* name, int64_t low_rank, Lora::Inner inner,
                            const at::Tensor& bias) {
    return register_module(name, std::make_shared<Lora>(D, low_rank, D, inner, bias));
  };
  w_lora_ = add_lora("w_lora", rank("decay_low_rank_dim", 2.5 * factor), Lora::Inner::kTanh,
                     decay + 0.5 + zigzag * 2.5);
  const int64_t v_rank = rank("v_low_rank_dim", 1.7 * factor);
  if (layer_ != 0) v_lora_ = add_lora("v_lora", v_rank, Lora::Inner::kNone, 0.73 - linear * 0.4);
  a_lora_ = add_lora("a_lora", rank("a_low_rank_dim", 2.5 * factor), Lora::Inner::kNone,
                     -0.19 + zigzag * 0.3 + linear * 0.4);
  g_lora_ = add_lora("g_lora", rank("gate_low_rank_dim", 5), Lora::Inner::kSigmoid, {});

  g_norm_ = register_module("g_norm", std::make_shared<torch::nn::Module>());
  g_norm_weight_ = g_norm_->register_parameter("weight", at::ones({D}));
  g_norm_bias_ = g_norm_->register_parameter("bias", at::zeros({D}));
  initialize(std::max<int64_t>(args.num_layers, layer_ + 1));

  c10::NoGradGuard no_grad;
  k_k_.copy_(0.71 - linear * 0.1);
}

void Rwkv7::initialize(int64_t layers) {
  c10::NoGradGuard no_grad;
  const int64_t D = sizes_.key_dim();
  const double rest = 1 - static_cast<double>(layer_) / static_cast<double>(layers);
  const at::Tensor share = at::arange(D, at::kFloat) / static_cast<double>(D);
  const double powers[] = {0.2, 0.9, 0.7, 0.7, 0.9, 0.2};  // in the order of kMixes
  for (size_t i = 0; i < mixes_.size(); ++i) {
    mixes_[i].copy_(1 - share.pow(powers[i] * rest).view({1, 1, D}));
  }
  k_a_.fill_(1.02);
  r_k_.fill_(-0.04);
  make_orthogonal(r_proj_->weight, 1);
  make_orthogonal(k_proj_->weight, 0.1);
  make_orthogonal(v_proj_->weight, 1);
  o_proj_->weight.zero_();
  for (const auto& linear : {r_proj_, k_proj_, v_proj_, o_proj_}) {
    linear->keeps_initialisation = true;
  }
  g_norm_weight_.fill_(
      std::pow(static_cast<double>(layer_ + 1) / static_cast<double>(layers), 0.7));
}

State Rwkv7::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent", zero_recurrent_state(sequences, sizes_, options));
  state.set("shift", zero_shift_state(sequences, sizes_.key_dim(), options));
  return state;
}

at::Tensor Rwkv7::value(const at::Tensor& xv, const Context& ctx) {
  const at::Tensor v = v_proj_->forward(xv);
  GDN_CHECK(layer_ == 0 || ctx.shared != nullptr, "[", kName, "] layer ", layer_,
            " takes the first layer's value from Context::shared, which is absent");
  if (ctx.shared == nullptr) return v;
  // In a hybrid the first layer of this kind need not be the model's first.
  if (layer_ == 0 || !ctx.shared->first_value.defined()) return ctx.shared->first_value = v;
  return at::lerp(v, ctx.shared->first_value, at::sigmoid(v_lora_->forward(xv)));
}

at::Tensor Rwkv7::group_norm(const at::Tensor& o) const {
  const int64_t B = o.size(0), T = o.size(1), D = sizes_.value_dim();
  const at::Tensor weight = g_norm_weight_.to(o.scalar_type()),
                   bias = g_norm_bias_.to(o.scalar_type());
  if (!naive_) {
    return at::group_norm(o.reshape({B * T, D}), sizes_.H, weight, bias, norm_eps_).view({B, T, D});
  }
  const at::Tensor centred = o - o.mean(3, /*keepdim=*/true);
  const at::Tensor variance = (centred * centred).mean(3, /*keepdim=*/true);
  return (centred * at::rsqrt(variance + norm_eps_)).view({B, T, D}) * weight + bias;
}

at::Tensor Rwkv7::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1), H = sizes_.H, K = sizes_.K;
  const at::ScalarType acc = ops::acc_type(x.scalar_type()), dtype = x.scalar_type();
  const auto heads = [&](const at::Tensor& t) { return t.view({B, T, H, K}); };
  const at::Tensor delta = token_shift(x, state, "shift") - x;
  const auto at_mix = [&](Mix i) { return x + delta * mixes_[i].to(dtype); };

  const at::Tensor r = r_proj_->forward(at_mix(kR));
  const at::Tensor w = at::sigmoid(w_lora_->forward(at_mix(kW)).to(acc)) * -kDecayRate;
  const at::Tensor key = k_proj_->forward(at_mix(kK));
  const at::Tensor v = value(at_mix(kV), ctx);
  const at::Tensor rate = at::sigmoid(a_lora_->forward(at_mix(kA)));
  const at::Tensor gate = g_lora_->forward(at_mix(kG));
  const at::Tensor raw = heads(key * k_k_.to(dtype));
  const at::Tensor kk = naive_ ? naive::l2norm(raw, kKeyNormEps) : ops::l2norm(raw, kKeyNormEps);
  const at::Tensor k = key * (1 + (rate - 1) * k_a_.to(dtype));

  DeltaInputs in;
  in.q = heads(r);
  in.k = heads(k);
  in.v = heads(v);
  in.g = heads(w);
  in.erase = "separate";
  in.a = -kk;
  in.p = kk * heads(rate);
  in.scale = 1.0;
  const at::Tensor o = run_delta_rule(in, delta_rule_form(mode_, T, naive_), state);

  const at::Tensor bonus = (in.q * in.k * r_k_.to(dtype)).sum(3, /*keepdim=*/true) * in.v;
  return o_proj_->forward((group_norm(o) + bonus.view({B, T, H * K})) * gate);
}

MixerInfo rwkv7_info() {
  return {
      kName,
      "RWKV-7",
      "arXiv 2503.14456",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      {
          mode_option(),
          {"head_dim", nullptr,
           "size of a head, a divisor of hidden_size; default: the largest one up to 64"},
          {"decay_low_rank_dim", nullptr,
           "rank of the decay's map; default: 2.5 sqrt(hidden_size) head_dim / 64 to the nearest "
           "multiple of 32, at least 32"},
          {"a_low_rank_dim", nullptr, "rank of the rate's map; default: as decay_low_rank_dim"},
          {"v_low_rank_dim", nullptr,
           "rank of the value residual's map; default: 1.7 sqrt(hidden_size) head_dim / 64 "
           "likewise"},
          {"gate_low_rank_dim", nullptr,
           "rank of the output gate's map; default: 5 sqrt(hidden_size) likewise"},
          {"norm_eps", nullptr,
           "epsilon of the output norm, which is multiplied by head_dim; default: that of the "
           "model"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Rwkv7>(args); },
  };
}

}  // namespace gdn
