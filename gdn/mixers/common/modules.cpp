// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/modules.h"

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/ops/linear.h"
#include "gdn/ops/norm.h"
#include "gdn/ops/short_conv.h"

namespace gdn {
namespace {

thread_local bool skip_initialization = false;

// torch.nn's default for weights and biases of that fan-in.
at::Tensor uniform_parameter(at::IntArrayRef sizes, int64_t fan_in) {
  c10::NoGradGuard no_grad;
  if (SkipInitialization::active()) return at::empty(sizes, at::kFloat);
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  return at::empty(sizes, at::kFloat).uniform_(-bound, bound);
}

at::Tensor in_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.defined() ? t.to(dtype) : t;
}

}  // namespace

Linear::Linear(int64_t in_features, int64_t out_features, bool with_bias) {
  weight =
      register_parameter("weight", uniform_parameter({out_features, in_features}, in_features));
  if (with_bias) bias = register_parameter("bias", uniform_parameter({out_features}, in_features));
}

SkipInitialization::SkipInitialization() : before_(skip_initialization) {
  skip_initialization = true;
}
SkipInitialization::~SkipInitialization() { skip_initialization = before_; }
bool SkipInitialization::active() { return skip_initialization; }

ops::Projection CastCache::get(const at::Tensor& weight, const at::Tensor& bias,
                               at::ScalarType dtype) {
  if (weight.scalar_type() == dtype) return {weight.contiguous(), in_dtype(bias, dtype)};
  const auto cast = [&] {
    return ops::Projection{weight.to(dtype).contiguous(), in_dtype(bias, dtype)};
  };
  // An inference tensor has no version; see the header for gradients.
  if (weight.is_inference() || weight.grad().defined()) return cast();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!cast_.weight.defined() || cast_.weight.scalar_type() != dtype ||
      of_ != weight.const_data_ptr() || version_ != weight._version()) {
    cast_ = cast();
    of_ = weight.const_data_ptr();
    version_ = weight._version();
  }
  return cast_;
}

void CastCache::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cast_ = {};
}

at::Tensor Linear::forward(const at::Tensor& x) {
  if (ops::is_few_rows(x)) return forward_all(x, {this})[0];
  if (c10::GradMode::is_enabled()) cast_.clear();
  std::optional<at::Tensor> b;
  if (bias.defined()) b = bias.to(x.scalar_type());
  return ops::linear(x, weight.to(x.scalar_type()), b);
}

std::vector<at::Tensor> forward_all(const at::Tensor& x, std::initializer_list<Linear*> layers) {
  if (ops::is_few_rows(x)) {
    std::vector<ops::Projection> projections;
    for (Linear* layer : layers) {
      projections.push_back(layer->cast_.get(layer->weight, layer->bias, x.scalar_type()));
    }
    return ops::few_rows(x, projections);
  }
  std::vector<at::Tensor> results;
  for (Linear* layer : layers) results.push_back(layer->forward(x));
  return results;
}

ShortConvolution::ShortConvolution(int64_t channels, int64_t width, bool with_bias,
                                   Activation activation)
    : activation_(activation) {
  weight = register_parameter("weight", uniform_parameter({channels, 1, width}, width));
  if (with_bias) bias = register_parameter("bias", uniform_parameter({channels}, width));
}

at::Tensor ShortConvolution::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  return at::zeros({sequences, weight.size(0), weight.size(2)}, options);
}

at::Tensor ShortConvolution::forward(const at::Tensor& x, StateAccess& state, const char* name,
                                     bool naive) {
  if (naive) return forward_naive(x, state, name);
  const at::Tensor w = weight.squeeze(1);
  const std::optional<std::string_view> activation =
      activation_ == Activation::kSilu ? std::optional<std::string_view>("silu") : std::nullopt;
  const std::optional<at::Tensor> b = bias.defined() ? std::optional(bias) : std::nullopt;
  if (state.step()) {
    const auto slots = state.slots().defined() ? std::optional(state.slots()) : std::nullopt;
    return ops::causal_conv1d_update_(x.select(1, 0), state.pool(name), w, b, slots, activation)
        .unsqueeze(1);
  }
  std::optional<at::Tensor> history, cu_seqlens;
  if (state.given()) history = state.read(name).to(x.scalar_type());
  if (state.cu_seqlens().defined()) cu_seqlens = state.cu_seqlens();
  auto [y, tail] = ops::causal_conv1d(x, w, b, history, cu_seqlens,
                                      /*output_final_state=*/state.given(), activation);
  if (state.given()) state.write(name, tail);
  return y;
}

at::Tensor ShortConvolution::forward_naive(const at::Tensor& x, StateAccess& state,
                                           const char* name) {
  const int64_t N = state.num_sequences(), W = weight.size(2);
  const at::Tensor history = state.given() ? state.read(name) : zero_state(N, x.options());
  const at::Tensor w = in_dtype(weight, x.scalar_type()), b = in_dtype(bias, x.scalar_type());
  std::vector<at::Tensor> outs, tails;
  auto run = [&](const at::Tensor& part, const at::Tensor& past) {
    outs.push_back(naive::short_conv(part, w, b, past));
    const at::Tensor all = at::cat({past, part.transpose(1, 2)}, 2);
    tails.push_back(all.narrow(2, all.size(2) - W, W));
  };
  if (state.cu_seqlens().defined()) {
    const at::Tensor cu = ops::host_cu_seqlens("short_conv", state.cu_seqlens(), x.size(1));
    const int64_t* ends = cu.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) {
      run(x.narrow(1, ends[n], ends[n + 1] - ends[n]), history.narrow(0, n, 1));
    }
  } else {
    run(x, history);
  }
  if (state.given()) state.write(name, at::cat(tails, 0).contiguous());
  const at::Tensor y = at::cat(outs, 1);
  return activation_ == Activation::kSilu ? at::silu(y) : y;
}

RmsNorm::RmsNorm(int64_t size, double eps) : eps_(eps) {
  weight = register_parameter("weight", at::ones({size}, at::kFloat));
}

at::Tensor RmsNorm::forward(const at::Tensor& x, bool naive) {
  if (naive) return naive::rms_norm(x, weight.to(x.scalar_type()), eps_);
  return ops::rms_norm(x, weight, eps_);
}

std::pair<at::Tensor, at::Tensor> RmsNorm::forward_added(const at::Tensor& x, const at::Tensor& y,
                                                         double scale, bool naive) {
  if (naive || x.scalar_type() != y.scalar_type()) {
    const at::Tensor sum = at::add(x, y, scale);
    return {sum, forward(sum, naive)};
  }
  auto [sum, norm] = ops::add_rms_norm(x, y, weight, scale, eps_);
  return {sum, norm};
}

at::Tensor RmsNorm::forward_gated(const at::Tensor& x, const at::Tensor& gate, bool naive,
                                  std::string_view activation) {
  if (!naive) return ops::rms_norm_gated(x, weight, gate, eps_, activation);
  const at::Tensor normed = naive::rms_norm(x, weight.to(x.scalar_type()), eps_);
  return normed * (activation == "sigmoid" ? at::sigmoid(gate) : at::silu(gate));
}

namespace naive {

at::Tensor l2norm(const at::Tensor& x, double eps) {
  return x * at::rsqrt((x * x).sum(-1, /*keepdim=*/true) + eps);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x * at::rsqrt((x * x).mean(-1, /*keepdim=*/true) + eps) * weight;
}

at::Tensor short_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& history) {
  const int64_t T = x.size(1), W = weight.size(2);
  const at::Tensor padded =
      at::cat({history.to(x.scalar_type()).narrow(2, 1, W - 1).transpose(1, 2), x}, 1);
  at::Tensor y = at::zeros_like(x);
  for (int64_t j = 0; j < W; ++j) y = y + padded.narrow(1, j, T) * weight.select(2, j).select(1, 0);
  return bias.defined() ? y + bias : y;
}

at::Tensor gdn_gate(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  return -A_log.exp() * at::softplus(a + dt_bias);
}

}  // namespace naive
}  // namespace gdn
