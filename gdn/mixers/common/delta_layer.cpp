// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/delta_layer.h"

#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/log.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "gdn/ops/gate.h"
#include "gdn/ops/norm.h"

namespace gdn {
namespace {

// size * factor, which must be whole.
int64_t whole(const Options& options, const char* size_name, int64_t size, const char* option,
              double factor) {
  const double exact = static_cast<double>(size) * factor;
  const int64_t rounded = std::llround(exact);
  options.check(rounded >= 1 && std::abs(exact - static_cast<double>(rounded)) <= 1e-5 * exact,
                size_name, " * ", option, " must be a whole number of at least 1, got ", size,
                " * ", factor, " = ", exact);
  return rounded;
}

constexpr double kDefaultLowerBound = -5;

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

HeadSizes sizes_by_head_dim(const Options& options, int64_t hidden_size, double share) {
  HeadSizes sizes{};
  sizes.K = options.positive_or("head_dim", default_head_dim(hidden_size));
  const int64_t heads =
      std::llround(share * static_cast<double>(hidden_size) / static_cast<double>(sizes.K));
  sizes.H = options.positive_or("num_heads", std::max<int64_t>(heads, 1));
  sizes.HV = options.positive_or("num_v_heads", sizes.H);
  options.check(sizes.HV % sizes.H == 0, "num_v_heads must be a multiple of num_heads (", sizes.H,
                "), got ", sizes.HV);
  sizes.V = whole(options, "head_dim", sizes.K, "expand_v", options.number("expand_v"));
  return sizes;
}

std::vector<MixerOption> head_dim_options(double share, double expand_v) {
  return {
      {"head_dim", nullptr,
       "key size K of a head; default: hidden_size / 8 rounded down to a power of two, from 64 to "
       "256, at most hidden_size"},
      {"num_heads", nullptr,
       str_cat("query and key heads H; default: ", share == 1 ? "" : str_cat(share, " * "),
               "hidden_size / head_dim, rounded, at least 1")},
      {"num_v_heads", nullptr, "value heads HV, a multiple of num_heads; default: num_heads"},
      {"expand_v", expand_v, "value size of a head divided by head_dim"},
  };
}

HeadSizes sizes_by_width(const Options& options, int64_t hidden_size) {
  const double expand_k = options.number_or("expand_k", hidden_size % 2 == 0 ? 0.5 : 1.0);
  const int64_t key_dim = whole(options, "hidden_size", hidden_size, "expand_k", expand_k);
  const int64_t value_dim =
      whole(options, "hidden_size", hidden_size, "expand_v", options.number("expand_v"));
  // The most heads that leave each at least the default size and divide both widths.
  int64_t heads = std::max<int64_t>(1, hidden_size / default_head_dim(hidden_size));
  while (key_dim % heads != 0 || value_dim % heads != 0) --heads;
  heads = options.positive_or("num_heads", heads);
  options.check(key_dim % heads == 0 && value_dim % heads == 0,
                "num_heads must divide the widths of keys and values (", key_dim, " and ",
                value_dim, "), got ", heads);
  return {heads, heads, key_dim / heads, value_dim / heads};
}

std::vector<MixerOption> width_options(MixerOption expand_k, double expand_v) {
  return {
      {"num_heads", nullptr,
       "heads; default: the most that divide the widths of keys and values and leave each the size "
       "hidden_size / 8 rounded down to a power of two, from 64 to 256"},
      std::move(expand_k),
      {"expand_v", expand_v, "width of values, all heads, divided by hidden_size"},
  };
}

MixerOption expand_k_option(double expand_k) {
  return {"expand_k", expand_k, "width of queries and keys, all heads, divided by hidden_size"};
}

int64_t kv_heads(const Options& options, int64_t num_heads) {
  const int64_t heads = options.positive_or("num_kv_heads", num_heads);
  options.check(num_heads % heads == 0, "num_kv_heads must divide num_heads (", num_heads,
                "), got ", heads);
  return heads;
}

MixerOption kv_heads_option() {
  return {"num_kv_heads", nullptr,
          "heads of keys and values, which groups of query heads share; default: num_heads"};
}

MixerOption mode_option() {
  return {"mode", "chunk",
          "form for whole sequences: chunk, or fused_recurrent (token by token); without gradients "
          "short inputs always take the latter"};
}

MixerOption norm_eps_option() {
  return {"norm_eps", nullptr, "epsilon of the output norm; default: that of the model"};
}

MixerOption neg_eigval_option(bool on) {
  return {"allow_neg_eigval", on,
          "write strength beta in (0,2) instead of (0,1), so that the transition may flip signs"};
}

std::vector<MixerOption> conv_options(bool on) {
  return {{"use_short_conv", on, "causal convolution over q, k and v"},
          {"conv_size", 4, "width of that convolution, at most 8"},
          {"conv_bias", false, "give it a bias"}};
}

std::vector<MixerOption> joined(std::initializer_list<std::vector<MixerOption>> parts) {
  std::vector<MixerOption> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

int64_t default_head_dim(int64_t hidden_size) {
  const auto eighth = std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(hidden_size / 8, 1)));
  return std::min(hidden_size, std::clamp<int64_t>(static_cast<int64_t>(eighth), 64, 256));
}

std::shared_ptr<Linear> add_linear(torch::nn::Module& owner, const char* name, int64_t in_features,
                                   int64_t out_features, bool with_bias) {
  return owner.register_module(name,
                               std::make_shared<Linear>(in_features, out_features, with_bias));
}

LowRank::LowRank(int64_t in_features, int64_t rank, int64_t out_features, bool with_bias)
    : down_(add_linear(*this, "0", in_features, rank)),
      up_(add_linear(*this, "1", rank, out_features, with_bias)) {}

at::Tensor LowRank::forward(const at::Tensor& x) { return up_->forward(down_->forward(x)); }

QkvConvolution::QkvConvolution(torch::nn::Module& owner, const Options& options, Widths widths,
                               Activation qk, Activation v, bool bare_activation)
    : qk_activation_(bare_activation ? qk : Activation::kNone),
      v_activation_(bare_activation ? v : Activation::kNone) {
  const int64_t size = options.conv_size();
  const bool bias = options.flag("conv_bias");
  if (!options.flag("use_short_conv")) return;
  const auto conv = [&](const char* name, int64_t channels, Activation activation) {
    return owner.register_module(
        name, std::make_shared<ShortConvolution>(channels, size, bias, activation));
  };
  q_ = conv("q_conv1d", widths.q, qk);
  k_ = conv("k_conv1d", widths.k, qk);
  v_ = conv("v_conv1d", widths.v, v);
}

void QkvConvolution::forward(at::Tensor& q, at::Tensor& k, at::Tensor& v, StateAccess& state,
                             bool naive) const {
  if (convolves()) {
    q = q_->forward(q, state, "conv_q", naive);
    k = k_->forward(k, state, "conv_k", naive);
    v = v_->forward(v, state, "conv_v", naive);
    return;
  }
  if (qk_activation_ == Activation::kSilu) {
    q = at::silu(q);
    k = at::silu(k);
  }
  if (v_activation_ == Activation::kSilu) v = at::silu(v);
}

void QkvConvolution::add_zero_state(State& state, int64_t sequences,
                                    const at::TensorOptions& options) const {
  if (!convolves()) return;
  state.set("conv_q", q_->zero_state(sequences, options));
  state.set("conv_k", k_->zero_state(sequences, options));
  state.set("conv_v", v_->zero_state(sequences, options));
}

at::Tensor write_strength(const at::Tensor& b, bool allow_neg_eigval, bool naive) {
  if (!naive) return ops::beta_sigmoid(b, allow_neg_eigval);
  return at::sigmoid(b.to(ops::acc_type(b.scalar_type()))) * (allow_neg_eigval ? 2.0 : 1.0);
}

ScalarDecay::ScalarDecay(torch::nn::Module& owner, int64_t heads) {
  c10::NoGradGuard no_grad;
  A_log_ = owner.register_parameter("A_log", initial_a_log(heads));
  dt_bias_ = owner.register_parameter("dt_bias", initial_dt_bias(heads));
}

at::Tensor ScalarDecay::forward(const at::Tensor& a, bool naive) const {
  if (!naive) return ops::gdn_gate(a, A_log_, dt_bias_);
  const at::ScalarType acc = ops::acc_type(a.scalar_type());
  return naive::gdn_gate(a.to(acc), A_log_.to(acc), dt_bias_.to(acc));
}

ChannelDecay::ChannelDecay(torch::nn::Module& owner, const Options& options, int64_t heads,
                           int64_t channels) {
  const bool safe = options.flag("safe_gate");
  const double bound = options.number_or("lower_bound", kDefaultLowerBound);
  options.check(bound < 0 && bound >= -5, "lower_bound must be in [-5,0), got ", bound);
  if (safe) lower_bound_ = bound;
  c10::NoGradGuard no_grad;
  const at::Tensor A = at::empty({heads}, at::kFloat).uniform_(1, 16);
  A_log_ = owner.register_parameter("A_log", safe ? at::zeros_like(A) : A.log());
  dt_bias_ = owner.register_parameter("dt_bias", initial_dt_bias(heads * channels));
}

at::Tensor ChannelDecay::forward(const at::Tensor& f, bool naive) const {
  const int64_t heads = A_log_.size(0);
  const at::Tensor by_head = f.view({f.size(0), f.size(1), heads, dt_bias_.size(0) / heads});
  if (!naive) return ops::kda_gate(by_head, A_log_, dt_bias_, lower_bound_);
  const at::ScalarType acc = ops::acc_type(f.scalar_type());
  const at::Tensor raw = by_head.to(acc) + dt_bias_.to(acc).view({heads, -1});
  const at::Tensor rate = A_log_.to(acc).exp().unsqueeze(1);
  return lower_bound_ ? at::sigmoid(rate * raw) * *lower_bound_ : -rate * at::softplus(raw);
}

std::vector<MixerOption> safe_gate_options() {
  return {{"safe_gate", false,
           "decay g = lower_bound sigmoid(exp(A_log) (f + dt_bias)) instead of "
           "-exp(A_log) softplus(f + dt_bias)"},
          {"lower_bound", kDefaultLowerBound, "the strongest decay of the safe gate, in [-5,0)"}};
}

LowRankDecay::LowRankDecay(torch::nn::Module& owner, const HeadSizes& sizes, int64_t hidden_size)
    : f_proj_(owner.register_module(
          "f_proj", std::make_shared<LowRank>(hidden_size, sizes.V, sizes.HV * sizes.K, false))) {}

void LowRankDecay::add_parameters(torch::nn::Module& owner, const Options& options,
                                  const HeadSizes& sizes) {
  decay_ = ChannelDecay(owner, options, sizes.HV, sizes.K);
}

at::Tensor LowRankDecay::forward(const at::Tensor& x, bool naive) const {
  return decay_.forward(f_proj_->forward(x), naive);
}

std::vector<MixerOption> low_rank_decay_options(double share) {
  return joined({{mode_option()},
                 head_dim_options(share, 1.0),
                 conv_options(),
                 {neg_eigval_option()},
                 safe_gate_options(),
                 {norm_eps_option()}});
}

at::Tensor feature_map(std::string_view name, const at::Tensor& x) {
  if (name == "relu") return at::relu(x);
  if (name == "elu") return at::elu(x) + 1.0;
  return name == "silu" ? at::silu(x) : x;
}

at::Tensor l2norm(const at::Tensor& x, bool naive) {
  return naive ? naive::l2norm(x) : ops::l2norm(x);
}

void normalize_qk(DeltaInputs& in, bool naive) {
  in.qk_l2norm = !naive;  // without an op of its own: one pass over memory less
  if (!naive) return;
  in.q = l2norm(in.q, true);
  in.k = l2norm(in.k, true);
}

at::Tensor run_delta_rule(const DeltaInputs& in, std::string_view form, StateAccess& state) {
  if (state.step() && form != "naive") {
    const ops::OptionalTensor slots =
        state.slots().defined() ? ops::OptionalTensor(state.slots()) : std::nullopt;
    at::Tensor o;
    for (int64_t t = 0; t < in.steps; ++t) {
      const auto at_t = [t](const ops::OptionalTensor& x) {
        return ops::has(x) ? ops::OptionalTensor(x->select(1, t)) : std::nullopt;
      };
      o = ops::delta_rule_step_(in.q.select(1, t), in.k.select(1, t), in.v.select(1, t), at_t(in.g),
                                at_t(in.beta), at_t(in.a), at_t(in.p), state.pool("recurrent"),
                                slots, in.scale, in.erase, in.qk_l2norm);
    }
    return o.unsqueeze(1);
  }
  ops::OptionalTensor initial, cu_seqlens;
  if (state.given()) initial = state.read("recurrent").to(ops::acc_type(in.q.scalar_type()));
  if (state.cu_seqlens().defined()) cu_seqlens = state.cu_seqlens() * in.steps;
  auto [o, final_state, saved] =
      ops::delta_rule(in.q, in.k, in.v, in.g, in.beta, in.a, in.p, in.scale, initial, cu_seqlens,
                      /*output_final_state=*/state.given(), in.erase, form, /*chunk_size=*/0,
                      /*save=*/false, in.qk_l2norm);
  if (state.given()) state.write("recurrent", final_state);
  if (in.steps == 1) return o;
  const int64_t B = o.size(0), T = o.size(1) / in.steps;
  return o.view({B, T, in.steps, o.size(2), o.size(3)}).select(2, in.steps - 1);
}

const char* delta_rule_form(std::string_view mode, int64_t T, bool naive) {
  // Up to this many tokens the recurrence beats the chunk form.
  constexpr int64_t kRecurrentUpTo = 64;
  if (naive) return "naive";
  const bool short_input = T <= kRecurrentUpTo && !c10::GradMode::is_enabled();
  return mode == "fused_recurrent" || short_input ? "recurrent" : "chunk";
}

at::Tensor zero_recurrent_state(int64_t sequences, const HeadSizes& sizes,
                                const at::TensorOptions& options) {
  const auto dtype = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  return at::zeros({sequences, sizes.HV, sizes.K, sizes.V}, options.dtype(dtype));
}

HeadOutput::HeadOutput(torch::nn::Module& owner, int64_t hidden_size, const HeadSizes& sizes,
                       double norm_eps, Config config)
    : gate_(std::move(config.gate)) {
  const int64_t width = sizes.value_dim();
  if (!gate_.empty() && config.gate_rank > 0) {
    low_rank_ = owner.register_module(
        "g_proj", std::make_shared<LowRank>(hidden_size, config.gate_rank, width, true));
  } else if (!gate_.empty()) {
    g_proj_ = add_linear(owner, "g_proj", hidden_size, width);
  }
  if (config.norm_name != nullptr) {
    norm_ = owner.register_module(config.norm_name, std::make_shared<RmsNorm>(sizes.V, norm_eps));
  }
  o_proj_ = add_linear(owner, "o_proj", width, hidden_size);
}

at::Tensor HeadOutput::forward(const at::Tensor& o, const at::Tensor& x, bool naive) const {
  at::Tensor y = o;
  if (gate_.empty()) {
    if (norm_) y = norm_->forward(o, naive);
  } else {
    const at::Tensor gate = low_rank_ ? low_rank_->forward(x) : g_proj_->forward(x);
    y = norm_->forward_gated(o, gate.view(o.sizes()), naive, gate_);
  }
  return o_proj_->forward(y.reshape({o.size(0), o.size(1), o.size(2) * o.size(3)}));
}

}  // namespace gdn
