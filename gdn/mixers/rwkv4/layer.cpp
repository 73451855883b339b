// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/rwkv4/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gdn/mixers/common/options.h"
#include "gdn/mixers/common/token_shift.h"
#include "gdn/mixers/rwkv4/op.h"

namespace gdn {
namespace {

constexpr const char* kName = "rwkv4";

// (c / (C - 1))^power for c = 0 .. C-1; a single channel counts as the first.
at::Tensor ramp(int64_t C, double power) {
  return at::pow(at::arange(C, at::kDouble) / static_cast<double>(std::max<int64_t>(C - 1, 1)),
                 power);
}

// The quotient of the two sums by plain exponentials, token by token: k, v [B,T,C], sums P and Q
// [B,C] of what came before, which become those after the last token. For moderate exponents only.
at::Tensor naive_wkv(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                     const at::Tensor& v, at::Tensor& P, at::Tensor& Q) {
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < k.size(1); ++t) {
    const at::Tensor k_t = k.select(1, t), v_t = v.select(1, t);
    const at::Tensor now = (u + k_t).exp();
    outs.push_back((P + now * v_t) / (Q + now));
    P = w.exp() * P + k_t.exp() * v_t;
    Q = w.exp() * Q + k_t.exp();
  }
  return outs.empty() ? v : at::stack(outs, 1);
}

}  // namespace

at::Tensor rwkv_initial_mix(int64_t hidden_size, int64_t layer, int64_t layers) {
  const double power = 1.0 - static_cast<double>(layer) / static_cast<double>(layers);
  return at::pow(at::arange(hidden_size, at::kDouble) / static_cast<double>(hidden_size), power)
      .to(at::kFloat)
      .view({1, 1, hidden_size});
}

Rwkv4::Rwkv4(const MixerArgs& args) : hidden_size_(args.hidden_size) {
  const Options options(kName, args);
  const int64_t D = hidden_size_;
  width_ = options.positive_or("attention_hidden_size", D);
  // How deep the layer lies, from 0 (first) to 1 (last).
  const double depth = args.num_layers > 1 ? static_cast<double>(args.layer_idx) /
                                                 static_cast<double>(args.num_layers - 1)
                                           : 0.0;
  {
    c10::NoGradGuard no_grad;
    time_decay_ = (ramp(width_, 0.7 + 1.3 * depth) * 8.0 - 5.0).to(at::kFloat);
    const at::Tensor zigzag = at::arange(1, width_ + 1, at::kLong).remainder(3) - 1;
    time_first_ = (zigzag * 0.5 + std::log(0.3)).to(at::kFloat);
    time_mix_key_ = rwkv_initial_mix(D, args.layer_idx, args.num_layers);
    time_mix_value_ = time_mix_key_ + 0.3 * depth;
    time_mix_receptance_ = time_mix_key_.sqrt();
  }
  time_decay_ = register_parameter("time_decay", time_decay_);
  time_first_ = register_parameter("time_first", time_first_);
  time_mix_key_ = register_parameter("time_mix_key", time_mix_key_);
  time_mix_value_ = register_parameter("time_mix_value", time_mix_value_);
  time_mix_receptance_ = register_parameter("time_mix_receptance", time_mix_receptance_);
  key_ = register_module("key", std::make_shared<Linear>(D, width_));
  value_ = register_module("value", std::make_shared<Linear>(D, width_));
  receptance_ = register_module("receptance", std::make_shared<Linear>(D, width_));
  output_ = register_module("output", std::make_shared<Linear>(width_, D));
}

State Rwkv4::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  const auto acc = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  state.set("shift", zero_shift_state(sequences, hidden_size_, options));
  state.set("wkv", at::zeros({sequences, 3, width_}, options.dtype(acc)));
  return state;
}

at::Tensor Rwkv4::wkv(const at::Tensor& k, const at::Tensor& v, StateAccess& state) const {
  const at::ScalarType acc = ops::acc_type(k.scalar_type());
  const at::Tensor w = -time_decay_.to(acc).exp(), u = time_first_.to(acc);
  if (!naive_ && state.step()) {
    return ops::wkv_step_(w, u, k.select(1, 0), v.select(1, 0), state.pool("wkv"),
                          ops::given(state.slots()))
        .unsqueeze(1);
  }
  std::optional<at::Tensor> initial;
  if (state.given()) initial = state.read("wkv").to(acc);
  if (!naive_) {
    auto [y, final_state, saved] = ops::wkv(w, u, k, v, initial, ops::given(state.cu_seqlens()),
                                            /*output_final_state=*/state.given(), /*save=*/false);
    if (state.given()) state.write("wkv", final_state);
    return y;
  }
  const int64_t N = state.num_sequences();
  std::vector<at::Tensor> outs, states;
  const auto run = [&](int64_t row, int64_t rows, int64_t begin, int64_t end, int64_t sequence) {
    const auto part = [&](const at::Tensor& t) {
      return t.to(acc).narrow(0, row, rows).slice(1, begin, end);
    };
    at::Tensor P = at::zeros({rows, width_}, k.options().dtype(acc)), Q = P;
    if (initial) {
      const at::Tensor before = initial->narrow(0, sequence, rows);
      P = before.select(1, 0) * before.select(1, 2).exp();
      Q = before.select(1, 1) * before.select(1, 2).exp();
    }
    outs.push_back(naive_wkv(w, u, part(k), part(v), P, Q));
    states.push_back(at::stack({P, Q, at::zeros_like(P)}, 1));  // sums of any scale are a state
  };
  const at::Tensor cu = ops::host_cu_seqlens(kName, state.cu_seqlens(), k.size(1));
  if (cu.defined()) {
    const int64_t* ends = cu.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) run(0, 1, ends[n], ends[n + 1], n);
  } else {
    run(0, N, 0, k.size(1), 0);
  }
  if (state.given()) state.write("wkv", at::cat(states, 0));
  return at::cat(outs, cu.defined() ? 1 : 0).to(k.scalar_type());
}

at::Tensor Rwkv4::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const at::Tensor before = token_shift(x, state, "shift");
  const auto mixed = [&](const at::Tensor& share) {
    return at::lerp(before, x, share.to(x.scalar_type()));
  };
  const at::Tensor k = key_->forward(mixed(time_mix_key_));
  const at::Tensor v = value_->forward(mixed(time_mix_value_));
  const at::Tensor r = receptance_->forward(mixed(time_mix_receptance_));
  return output_->forward(at::sigmoid(r) * wkv(k, v, state));
}

MixerInfo rwkv4_info() {
  return {
      kName,
      "RWKV-4",
      "arXiv 2305.13048",
      {"naive", "recurrent", "step"},
      {"cpu"},
      {
          {"attention_hidden_size", nullptr, "channels of the time mix; default: hidden_size"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Rwkv4>(args); },
  };
}

}  // namespace gdn
