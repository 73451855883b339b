// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/s4d/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/glu.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/real.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gdn/mixers/common/options.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr const char* kName = "s4d";
constexpr double kPi = 3.14159265358979323846;

// Powers of the transitions for T tokens in two levels: exponent l = i * inner + j is the product
// of coarse [D,M,outer] at i and fine [D,M,inner] at j, so that D M sqrt(T) numbers do for D M T.
struct Powers {
  int64_t inner, outer;
  at::Tensor fine, coarse;

  Powers(const at::Tensor& log_transition, int64_t T)
      : inner(static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(T))))),
        outer((T + inner - 1) / inner) {
    const auto real =
        log_transition.options().dtype(c10::toRealValueType(log_transition.scalar_type()));
    const auto powers = [&](int64_t count, int64_t step) {
      return (log_transition.unsqueeze(-1) * (at::arange(count, real) * step)).exp();
    };
    fine = powers(inner, 1);
    coarse = powers(outer, inner);
  }

  // 2 Re sum_m weight[..,d,m] transition[d,m]^l for l < T: [..,D,M] -> [..,D,T].
  at::Tensor expand(const at::Tensor& weight, int64_t T) const {
    const at::Tensor rows = (weight.unsqueeze(-1) * coarse).transpose(-1, -2);  // [..,D,outer,M]
    const at::Tensor left = at::cat({at::real(rows), -at::imag(rows)}, -1);
    const at::Tensor right = at::cat({at::real(fine), at::imag(fine)}, -2);  // [D,2M,inner]
    return 2 * at::matmul(left, right).flatten(-2).narrow(-1, 0, T);
  }

  // sum_l transition^(T-1-l) u_l: [B,D,T] -> complex [B,D,M].
  at::Tensor gather(const at::Tensor& u) const {
    const int64_t B = u.size(0), D = u.size(1), T = u.size(2);
    const at::Tensor rows =
        at::constant_pad_nd(u, {inner * outer - T, 0}).view({B, D, outer, inner});
    const at::Tensor turned = fine.flip(-1).transpose(-1, -2);  // [D,inner,M]
    const at::Tensor sums =
        at::complex(at::matmul(rows, at::real(turned)), at::matmul(rows, at::imag(turned)));
    return (sums * coarse.flip(-1).transpose(-1, -2)).sum(-2);
  }
};

// One sequence each in u [B,D,T], from and to the states h, complex [B,D,M].
at::Tensor convolve(const at::Tensor& log_transition, const at::Tensor& read, const at::Tensor& u,
                    bool with_state, at::Tensor& h) {
  const int64_t T = u.size(2), size = 2 * T;
  const Powers powers(log_transition, T);
  const at::Tensor kernel = powers.expand(read, T);  // [D,T]
  at::Tensor y =
      at::fft_irfft(at::fft_rfft(u, size) * at::fft_rfft(kernel, size), size).narrow(-1, 0, T);
  if (!with_state) return y;
  const at::Tensor transition = log_transition.exp();
  y = y + powers.expand(read * transition * h, T);
  h = (log_transition * static_cast<double>(T)).exp() * h + powers.gather(u);
  return y;
}

// The same token by token.
at::Tensor recur(const at::Tensor& log_transition, const at::Tensor& read, const at::Tensor& u,
                 at::Tensor& h) {
  const at::Tensor transition = log_transition.exp();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < u.size(2); ++t) {
    h = transition * h + u.select(2, t).unsqueeze(-1);
    outs.push_back(2 * at::real(read * h).sum(-1));
  }
  return at::stack(outs, 2);
}

}  // namespace

// S4D-Lin: decay 1/2 and frequencies pi m, step sizes log-uniform in [0.001, 0.1].
S4d::Kernel::Kernel(int64_t channels, int64_t modes) {
  c10::NoGradGuard no_grad;
  log_dt = register_parameter(
      "log_dt", at::empty({channels}, at::kFloat).uniform_(std::log(0.001), std::log(0.1)));
  C = register_parameter("C", at::randn({channels, modes, 2}, at::kFloat) * std::sqrt(0.5));
  log_A_real =
      register_parameter("log_A_real", at::full({channels, modes}, std::log(0.5), at::kFloat));
  A_imag = register_parameter(
      "A_imag", (at::arange(modes, at::kFloat) * kPi).expand({channels, modes}).clone());
}

S4d::S4d(const MixerArgs& args) : channels_(args.hidden_size) {
  const Options options(kName, args);
  const int64_t states = options.positive("state_size");
  options.check(states % 2 == 0, "state_size must be even (conjugate pairs), got ", states);
  modes_ = states / 2;
  kernel_ = register_module("kernel", std::make_shared<Kernel>(channels_, modes_));
  D_ = register_parameter("D", at::randn({channels_}, at::kFloat));
  output_linear_ = register_module(
      "output_linear", std::make_shared<Linear>(channels_, 2 * channels_, /*with_bias=*/true));
}

State S4d::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  const auto acc = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  State state;
  state.set("modes", at::zeros({sequences, channels_, modes_, 2}, options.dtype(acc)));
  return state;
}

S4d::Modes S4d::modes(at::ScalarType dtype) const {
  const at::Tensor A = at::complex(-kernel_->log_A_real.to(dtype).exp(),
                                   kernel_->A_imag.to(dtype));  // [D,M]
  const at::Tensor log_transition = A * kernel_->log_dt.to(dtype).exp().unsqueeze(-1);
  const at::Tensor C = at::view_as_complex(kernel_->C.to(dtype));
  return {log_transition, C * (log_transition.exp() - 1) / A};
}

at::Tensor S4d::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const at::ScalarType acc = ops::acc_type(x.scalar_type());
  const int64_t T = x.size(1), N = state.num_sequences();
  const at::Tensor u = x.to(acc).transpose(1, 2);  // [B,D,T]
  const Modes m = modes(acc);
  at::Tensor before = state.given() ? state.read("modes").to(acc)
                                    : at::zeros({N, channels_, modes_, 2}, u.options());
  std::vector<at::Tensor> outs, states;
  const auto run = [&](const at::Tensor& part, const at::Tensor& start) {
    at::Tensor h = at::view_as_complex(start);
    if (part.size(2) == 0) {
      outs.push_back(part);
    } else if (naive_ || (state.step() && part.size(2) == 1)) {
      outs.push_back(recur(m.log_transition, m.read, part, h));
    } else {
      outs.push_back(convolve(m.log_transition, m.read, part, state.given(), h));
    }
    states.push_back(at::view_as_real(h));
  };
  const at::Tensor cu = ops::host_cu_seqlens(kName, state.cu_seqlens(), T);
  if (cu.defined()) {
    const int64_t* ends = cu.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) run(u.slice(2, ends[n], ends[n + 1]), before.narrow(0, n, 1));
  } else {
    run(u, before);
  }
  if (state.given() && T > 0) state.write("modes", at::cat(states, 0));
  at::Tensor y = at::cat(outs, cu.defined() ? 2 : 0);
  y = at::gelu(y + D_.to(acc).unsqueeze(-1) * u).transpose(1, 2).to(x.scalar_type());
  return at::glu(output_linear_->forward(y), -1);
}

MixerInfo s4d_info() {
  return {
      kName,
      "S4D",
      "arXiv 2206.11893",
      {"naive", "convolution", "step"},
      {"cpu"},
      {
          {"state_size", 64, "states of each channel, even: conjugate pairs"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<S4d>(args); },
  };
}

}  // namespace gdn
