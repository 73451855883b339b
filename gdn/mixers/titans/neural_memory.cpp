// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/titans/neural_memory.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

// Where the gates start: a small step, half of the momentum, slow forgetting.
constexpr double kThetaBias = -3, kEtaBias = 0, kAlphaBias = -4;

}  // namespace

std::vector<MixerOption> neural_memory_options() {
  return {
      {"num_heads", nullptr,
       "memories, one per head; default: hidden_size / head_dim, rounded, at least 1"},
      {"head_dim", nullptr,
       "size of keys, values and queries; default: hidden_size / 8 rounded down to a power of two, "
       "from 64 to 256, at most hidden_size"},
      {"memory_depth", 2, "layers of the memory network, 1 to 4"},
      {"expansion", 4.0, "width between its layers divided by head_dim"},
      {"memory_activation", "silu", "between its layers: silu or gelu (tanh form)"},
      {"memory_bias", false, "biases in the memory network"},
      {"memory_norm", false, "memory f(x) = x + LN(z(x)), the objective of TTT; false: z(x)"},
      {"chunk_size", nullptr,
       "tokens whose inner gradients are taken at the same weights, part of the model; default: "
       "16, "
       "and 1 for depth 1 without memory_norm (computed chunk-parallel all the same)"},
      {"momentum", true, "momentum eta; false: each update is the step alone"},
      {"forgetting", true, "forgetting alpha; false: the memory never decays"},
      {"decay_to", "auto",
       "what forgetting leads to: start (the learned weights), zero, or auto: start for depth 2 "
       "and "
       "more, else zero"},
      {"inner_loss", "sum",
       "of the squared error over the channels: sum (gradient factor 2), half (1) or mean (2 / "
       "head_dim)"},
      {"theta_max", nullptr, "largest step theta; default: 1 / the loss's gradient factor"},
      {"theta_scale", "fixed",
       "fixed, or stable: theta times (2 - alpha) (1 - eta) / chunk_size, which no repeated key "
       "makes diverge"},
      {"rates", "token",
       "theta, eta and alpha from each token, or from the mean over the previous chunk: chunk"},
      {"inner_clip", nullptr,
       "largest norm of a token's gradient in a layer, 0: none; default: 10 for depth 2 and more, "
       "else 0"},
      {"read", "after", "a token reads the memory after its own update, or before"},
      {"qk_norm", true, "queries and keys of length 1"},
      {"use_short_conv", true, "causal convolution over q, k and v before SiLU"},
      {"conv_size", 4, "width of that convolution, at most 8"},
      norm_eps_option(),
  };
}

NeuralMemory::NeuralMemory(const Options& options, const MixerArgs& args) {
  const int64_t D = args.hidden_size;
  head_dim_ = options.positive_or("head_dim", default_head_dim(D));
  const int64_t heads = std::llround(static_cast<double>(D) / static_cast<double>(head_dim_));
  num_heads_ = options.positive_or("num_heads", std::max<int64_t>(heads, 1));
  config_.rule = "lmm";
  config_.depth = options.positive("memory_depth");
  options.check(config_.depth <= 4, "memory_depth must be 1 to 4, got ", config_.depth);
  const double hidden = options.number("expansion") * static_cast<double>(head_dim_);
  options.check(config_.depth == 1 || std::llround(hidden) >= 1,
                "expansion * head_dim must be at least 1, got ", hidden);
  config_.hidden = config_.depth == 1 ? 0 : std::llround(hidden);
  config_.activation = options.text("memory_activation", {"silu", "gelu"});
  config_.bias = options.flag("memory_bias");
  config_.norm_eps = options.number_or("norm_eps", args.norm_eps);
  config_.read_before = options.text("read", {"after", "before"}) == "before";
  const bool norm = options.flag("memory_norm"), linear = config_.depth == 1;
  momentum_ = options.flag("momentum");
  forgetting_ = options.flag("forgetting");
  const std::string loss = options.text("inner_loss", {"sum", "half", "mean"});
  config_.loss_scale = loss == "sum"    ? 2.0
                       : loss == "half" ? 1.0
                                        : 2.0 / static_cast<double>(head_dim_);
  theta_max_ = options.number_or("theta_max", 1.0 / config_.loss_scale);
  options.check(theta_max_ > 0, "theta_max must be positive, got ", theta_max_);
  stable_theta_ = options.text("theta_scale", {"fixed", "stable"}) == "stable";
  per_chunk_ = options.text("rates", {"token", "chunk"}) == "chunk";
  config_.clip = options.number_or("inner_clip", linear ? 0.0 : 10.0);
  options.check(config_.clip >= 0, "inner_clip must not be negative, got ", config_.clip);
  const std::string decay_to = options.text("decay_to", {"auto", "start", "zero"});
  anchored_ = forgetting_ && (decay_to == "start" || (decay_to == "auto" && !linear));
  config_.chunk = options.positive_or("chunk_size", linear && !norm ? 1 : 16);
  config_.sequential = linear && !norm && !anchored_ && config_.clip == 0 && config_.chunk == 1;
  qk_norm_ = options.flag("qk_norm");

  q_proj_ = add_linear(*this, "q_proj", D, width());
  k_proj_ = add_linear(*this, "k_proj", D, width());
  v_proj_ = add_linear(*this, "v_proj", D, width());
  const int64_t conv_size = options.conv_size();
  if (options.flag("use_short_conv")) {
    auto conv = [&](const char* name) {
      return register_module(name, std::make_shared<ShortConvolution>(
                                       width(), conv_size, /*with_bias=*/false, Activation::kSilu));
    };
    q_conv_ = conv("q_conv1d");
    k_conv_ = conv("k_conv1d");
    v_conv_ = conv("v_conv1d");
  }
  std::vector<at::Tensor> bias = {at::full({num_heads_}, kThetaBias, at::kFloat)};
  if (momentum_) bias.push_back(at::full({num_heads_}, kEtaBias, at::kFloat));
  if (forgetting_) bias.push_back(at::full({num_heads_}, kAlphaBias, at::kFloat));
  const auto rates = static_cast<int64_t>(bias.size());
  rates_proj_ = add_linear(*this, "rates_proj", D, rates * num_heads_);
  rates_bias_ = register_parameter("rates_bias", at::cat(bias, 0));
  start_ = register_module(
      "start", std::make_shared<MemoryWeights>(num_heads_, head_dim_, config_, norm ? 0.02 : 0.0));
  if (norm) {
    // The size of v - k per channel for keys and values of length 1.
    const double gain = std::sqrt(2.0 / static_cast<double>(head_dim_));
    norm_weight_ = register_parameter("memory_norm_weight",
                                      at::full({num_heads_, head_dim_}, gain, at::kFloat));
    norm_bias_ = register_parameter("memory_norm_bias", at::zeros({num_heads_, head_dim_}));
  }
}

at::Tensor NeuralMemory::heads(const at::Tensor& x) const {
  return x.view({x.size(0), x.size(1), num_heads_, head_dim_});
}

at::Tensor NeuralMemory::normed(const at::Tensor& x, bool naive) const {
  return qk_norm_ ? l2norm(heads(x), naive) : heads(x);
}

at::Tensor NeuralMemory::convolve(ShortConvolution* conv, const at::Tensor& x, StateAccess& state,
                                  const char* name, bool naive) const {
  return conv != nullptr ? conv->forward(x, state, name, naive) : at::silu(x);
}

void NeuralMemory::add_norm(ops::MemoryTensors& in, at::ScalarType acc) const {
  if (!norm_weight_.defined()) return;
  in.norm_weight = norm_weight_.to(acc);
  in.norm_bias = norm_bias_.to(acc);
}

// For each token the mean of the chunk before its own, zero in the first. logits [B,T,G].
at::Tensor NeuralMemory::previous_chunk_means(const at::Tensor& logits, StateAccess& state) const {
  const int64_t b = config_.chunk, N = state.num_sequences(), G = logits.size(2);
  const at::Tensor before = tokens_before(state);
  const int64_t* position = before.const_data_ptr<int64_t>();
  const at::Tensor cu = ops::host_cu_seqlens("neural_memory", state.cu_seqlens(), logits.size(1));
  const int64_t* ends = ops::data_or_null(cu);
  at::Tensor sums = at::zeros({N, G}, logits.options()), means = sums;
  if (state.given()) {
    const at::Tensor seen = before.gt(0).unsqueeze(1).to(logits.scalar_type());
    sums = state.read("rates_sum").to(logits.scalar_type()) * seen;
    means = state.read("rates_mean").to(logits.scalar_type()) * seen;
  }
  std::vector<at::Tensor> all, left_sums, left_means;
  for (int64_t n = 0; n < N; ++n) {
    const at::Tensor part =
        ends != nullptr ? logits[0].slice(0, ends[n], ends[n + 1]) : logits[n];  // [T,G]
    const int64_t T = part.size(0), at = position[n] % b;
    at::Tensor sum = sums[n], mean = means[n];
    const int64_t head = std::min((b - at) % b, T), full = (T - head) / b;
    std::vector<at::Tensor> rows;
    if (head > 0) {
      rows.push_back(mean.unsqueeze(0).expand({head, G}));
      sum = sum + part.slice(0, 0, head).sum(0);
      if (at + head == b) {
        mean = sum / b;
        sum = at::zeros_like(sum);
      }
    }
    if (full > 0) {
      const at::Tensor own = part.narrow(0, head, full * b).view({full, b, G}).mean(1);
      rows.push_back(
          at::cat({mean.unsqueeze(0), own.slice(0, 0, full - 1)}, 0).repeat_interleave(b, 0));
      mean = own[full - 1];
    }
    const int64_t tail = T - head - full * b;
    if (tail > 0) {
      rows.push_back(mean.unsqueeze(0).expand({tail, G}));
      sum = sum + part.slice(0, T - tail).sum(0);
    }
    if (!rows.empty()) all.push_back(at::cat(rows, 0));
    left_sums.push_back(sum);
    left_means.push_back(mean);
  }
  if (state.given()) {
    state.write("rates_sum", at::stack(left_sums, 0));
    state.write("rates_mean", at::stack(left_means, 0));
  }
  return all.empty() ? logits : at::cat(all, 0).view_as(logits);
}

void NeuralMemory::add_rates(ops::MemoryTensors& in, const at::Tensor& projected,
                             StateAccess& state) const {
  const at::ScalarType acc = ops::acc_type(projected.scalar_type());
  at::Tensor logits = projected.to(acc);  // [B,T,rates*H]
  if (per_chunk_) logits = previous_chunk_means(logits, state);
  const at::Tensor rates = at::sigmoid(logits + rates_bias_.to(acc));
  int64_t next = num_heads_;
  auto take = [&] {
    const at::Tensor rate = rates.narrow(2, next, num_heads_);
    next += num_heads_;
    return rate;
  };
  if (momentum_) in.eta = take();
  if (forgetting_) in.alpha = take();
  in.rate = rates.narrow(2, 0, num_heads_) * theta_max_;
  if (!stable_theta_) return;
  in.rate = in.rate / static_cast<double>(config_.chunk);
  in.rate = in.rate * (forgetting_ ? 2 - in.alpha : at::full({1}, 2, in.rate.options()));
  if (momentum_) in.rate = in.rate * (1 - in.eta);
}

MemoryStart NeuralMemory::learned_start(at::ScalarType dtype) const {
  return {start_->flat().to(ops::acc_type(dtype)), {}};
}

LoopLinear NeuralMemory::projections(const at::Tensor& x) {
  return {{q_proj_.get(), k_proj_.get(), v_proj_.get(), rates_proj_.get()}, x};
}

at::Tensor NeuralMemory::forward(const at::Tensor& x, StateAccess& state, bool naive,
                                 const MemoryStart* start) {
  return forward(
      {q_proj_->forward(x), k_proj_->forward(x), v_proj_->forward(x), rates_proj_->forward(x)},
      learned_start(x.scalar_type()), state, naive, start);
}

at::Tensor NeuralMemory::forward(const std::vector<at::Tensor>& projected,
                                 const MemoryStart& learned, StateAccess& state, bool naive,
                                 const MemoryStart* start) {
  ops::MemoryTensors in;
  in.q = normed(convolve(q_conv_.get(), projected[0], state, "conv_q", naive), naive);
  in.k = normed(convolve(k_conv_.get(), projected[1], state, "conv_k", naive), naive);
  in.v = heads(convolve(v_conv_.get(), projected[2], state, "conv_v", naive));
  add_rates(in, projected[3], state);
  add_norm(in, ops::acc_type(projected[0].scalar_type()));
  if (anchored_) in.anchor = learned.memory;
  return memory_with_state(std::move(in), config_, start != nullptr ? *start : learned, state,
                           naive);
}

at::Tensor NeuralMemory::queries(const at::Tensor& x, StateAccess& state, const char* conv,
                                 bool naive) {
  return normed(convolve(q_conv_.get(), q_proj_->forward(x), state, conv, naive), naive);
}

at::Tensor NeuralMemory::read(const at::Tensor& queries, const at::Tensor& weights) const {
  ops::MemoryTensors in;
  add_norm(in, ops::acc_type(queries.scalar_type()));
  return ops::test_time_memory_read(queries, weights, in, config_);
}

MemoryStart NeuralMemory::start_after(const at::Tensor& persistent, bool naive,
                                      at::Tensor* outputs) {
  const at::Tensor x = persistent.unsqueeze(0);
  State local;
  add_zero_state(local, 1, x.options().requires_grad(false));
  Context ctx;
  ctx.state = &local;
  StateAccess access("titans", x, ctx, *this);
  const at::Tensor o = forward(x, access, naive);
  if (outputs != nullptr) *outputs = o;
  MemoryStart start = {local["memory"][0], {}};
  if (local.has("momentum")) start.momentum = local["momentum"][0];
  return start;
}

void NeuralMemory::add_zero_state(State& state, int64_t sequences,
                                  const at::TensorOptions& options) const {
  add_memory_state(state, sequences, num_heads_, head_dim_, config_, momentum_, options);
  if (q_conv_ != nullptr) {
    state.set("conv_q", q_conv_->zero_state(sequences, options));
    state.set("conv_k", k_conv_->zero_state(sequences, options));
    state.set("conv_v", v_conv_->zero_state(sequences, options));
  }
  if (per_chunk_) {
    const auto acc = options.dtype(ops::acc_type(c10::typeMetaToScalarType(options.dtype())));
    for (const char* name : {"rates_sum", "rates_mean"})
      state.set(name, at::zeros({sequences, rates_bias_.size(0)}, acc));
  }
}

void NeuralMemory::add_read_state(State& state, const char* conv, int64_t sequences,
                                  const at::TensorOptions& options) const {
  if (q_conv_ != nullptr) state.set(conv, q_conv_->zero_state(sequences, options));
}

}  // namespace gdn
