// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mamba/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <vector>

#include "gdn/mixers/common/options.h"
#include "gdn/mixers/mamba/op.h"
#include "gdn/ops/swiglu.h"

namespace gdn {
namespace {

constexpr const char* kName = "mamba";

// The recurrence of B sequences token by token: x, dt [B,T,C], A [C,S], B, C [B,T,S], h [B,C,S],
// which becomes the state after the last token.
at::Tensor naive_scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A,
                      const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                      bool signed_transition, at::Tensor& h) {
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < x.size(1); ++t) {
    const at::Tensor x_t = x.select(1, t), dt_t = dt.select(1, t);  // [B,C]
    at::Tensor a = (dt_t.unsqueeze(-1) * A).exp();                  // [B,C,S]
    if (signed_transition) a = 2 * a - 1;
    h = a * h + (dt_t * x_t).unsqueeze(-1) * B.select(1, t).unsqueeze(1);
    outs.push_back(at::einsum("bcs,bs->bc", {h, C.select(1, t)}) + D * x_t);
  }
  return outs.empty() ? x : at::stack(outs, 1);
}

}  // namespace

// Uniform weights of the size that keeps the step sizes' variance; a bias whose softplus is
// log-uniform over [0.001, 0.1].
Mamba::StepProjection::StepProjection(int64_t rank, int64_t channels) {
  c10::NoGradGuard no_grad;
  const double bound = 1.0 / std::sqrt(static_cast<double>(rank));
  weight =
      register_parameter("weight", at::empty({channels, rank}, at::kFloat).uniform_(-bound, bound));
  const at::Tensor dt = at::empty({channels}, at::kFloat)
                            .uniform_(std::log(0.001), std::log(0.1))
                            .exp_()
                            .clamp_min_(1e-4);
  bias = register_parameter("bias", dt + at::log(-at::expm1(-dt)));
}

Mamba::Mamba(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  states_ = options.positive("state_size");
  rank_ = options.positive_or("time_step_rank", (D + 15) / 16);
  channels_ = options.positive("expand") * D;
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  const bool bias = options.flag("use_bias");
  in_proj_ = register_module("in_proj", std::make_shared<Linear>(D, 2 * channels_, bias));
  conv1d_ = register_module(
      "conv1d", std::make_shared<ShortConvolution>(channels_, options.conv_size(),
                                                   options.flag("conv_bias"), Activation::kSilu));
  x_proj_ = register_module("x_proj", std::make_shared<Linear>(channels_, rank_ + 2 * states_));
  dt_proj_ = register_module("dt_proj", std::make_shared<StepProjection>(rank_, channels_));
  {
    c10::NoGradGuard no_grad;
    A_log_ = at::arange(1, states_ + 1, at::kFloat).log().expand({channels_, states_}).clone();
  }
  A_log_ = register_parameter("A_log", A_log_);
  D_ = register_parameter("D", at::ones({channels_}, at::kFloat));
  out_proj_ = register_module("out_proj", std::make_shared<Linear>(channels_, D, bias));
}

State Mamba::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  const auto acc = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  state.set("recurrent", at::zeros({sequences, channels_, states_}, options.dtype(acc)));
  state.set("conv", conv1d_->zero_state(sequences, options));
  return state;
}

// x, dt (without its bias) [B,T,C], B, C [B,T,S] -> y [B,T,C].
at::Tensor Mamba::scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& B,
                       const at::Tensor& C, StateAccess& state) const {
  const at::ScalarType acc = ops::acc_type(x.scalar_type());
  const at::Tensor A = -A_log_.to(acc).exp(), D = D_.to(acc), dt_bias = dt_proj_->bias.to(acc);
  if (!naive_ && state.step()) {
    const auto slots = ops::given(state.slots());
    return ops::selective_scan_step_(x.select(1, 0), dt.select(1, 0), A, B.select(1, 0),
                                     C.select(1, 0), D, dt_bias, state.pool("recurrent"), slots,
                                     /*softplus=*/true, allow_neg_eigval_)
        .unsqueeze(1);
  }
  std::optional<at::Tensor> initial;
  if (state.given()) initial = state.read("recurrent").to(acc);
  if (!naive_) {
    auto [y, final_state, saved] = ops::selective_scan(
        x, dt, A, B, C, D, dt_bias, initial, ops::given(state.cu_seqlens()),
        /*output_final_state=*/state.given(), /*softplus=*/true, allow_neg_eigval_, /*save=*/false);
    if (state.given()) state.write("recurrent", final_state);
    return y;
  }
  const at::Tensor sizes = at::softplus(dt.to(acc) + dt_bias);
  const int64_t N = state.num_sequences();
  std::vector<at::Tensor> outs, states;
  const auto run = [&](int64_t row, int64_t rows, int64_t begin, int64_t end, int64_t sequence) {
    const auto part = [&](const at::Tensor& t) {
      return t.to(acc).narrow(0, row, rows).slice(1, begin, end);
    };
    at::Tensor h = initial ? initial->narrow(0, sequence, rows)
                           : at::zeros({rows, channels_, states_}, x.options().dtype(acc));
    outs.push_back(naive_scan(part(x), part(sizes), A, part(B), part(C), D, allow_neg_eigval_, h));
    states.push_back(h);
  };
  const at::Tensor cu = ops::host_cu_seqlens(kName, state.cu_seqlens(), x.size(1));
  if (cu.defined()) {
    const int64_t* ends = cu.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) run(0, 1, ends[n], ends[n + 1], n);
  } else {
    run(0, N, 0, x.size(1), 0);
  }
  if (state.given()) state.write("recurrent", at::cat(states, 0));
  return at::cat(outs, cu.defined() ? 1 : 0).to(x.scalar_type());
}

at::Tensor Mamba::forward(const at::Tensor& input, const Context& ctx) {
  StateAccess state(kName, input, ctx, *this);
  const at::Tensor xz = in_proj_->forward(input);  // [B,T,2C]
  const at::Tensor x = conv1d_->forward(xz.narrow(2, 0, channels_), state, "conv", naive_);
  const at::Tensor parts = x_proj_->forward(x);  // [B,T,rank+2S]
  const at::Tensor dt = at::linear(parts.narrow(2, 0, rank_), dt_proj_->weight.to(x.scalar_type()));
  const at::Tensor y = scan(x, dt, parts.narrow(2, rank_, states_),
                            parts.narrow(2, rank_ + states_, states_), state);
  const at::Tensor z = xz.narrow(2, channels_, channels_);
  return out_proj_->forward(naive_ ? at::silu(z) * y : ops::swiglu(z, y));
}

MixerInfo mamba_info() {
  return {
      kName,
      "Mamba",
      "arXiv 2312.00752",
      {"naive", "recurrent", "step"},
      {"cpu"},
      {
          {"state_size", 16, "states of each channel"},
          {"expand", 2, "channels divided by hidden_size"},
          {"time_step_rank", nullptr,
           "rank of the step sizes' projection; default: hidden_size / 16, rounded up"},
          {"conv_size", 4, "width of the causal convolution, at most 8"},
          {"conv_bias", true, "give it a bias"},
          {"use_bias", false, "biases in in_proj and out_proj"},
          {"allow_neg_eigval", false,
           "transitions 2 exp(dt A) - 1 in (-1,1] instead of exp(dt A), so that states may flip "
           "signs (arXiv 2411.12537)"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Mamba>(args); },
  };
}

}  // namespace gdn
