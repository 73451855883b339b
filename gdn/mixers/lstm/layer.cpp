// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/lstm/layer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/lstm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gdn/mixers/common/options.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr const char* kName = "lstm";

}  // namespace

Lstm::Lstm(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  width_ = options.positive_or("width", D);
  const double bound = 1.0 / std::sqrt(static_cast<double>(width_));
  const auto uniform = [&](const char* name, at::IntArrayRef sizes) {
    c10::NoGradGuard no_grad;
    return register_parameter(name, at::empty(sizes, at::kFloat).uniform_(-bound, bound));
  };
  weight_ih_ = uniform("weight_ih_l0", {4 * width_, D});
  weight_hh_ = uniform("weight_hh_l0", {4 * width_, width_});
  if (options.flag("bias")) {
    bias_ih_ = uniform("bias_ih_l0", {4 * width_});
    bias_hh_ = uniform("bias_hh_l0", {4 * width_});
  }
  if (width_ != D) o_proj_ = register_module("o_proj", std::make_shared<Linear>(width_, D));
}

State Lstm::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  const auto acc = ops::acc_type(c10::typeMetaToScalarType(options.dtype()));
  State state;
  for (const char* name : {"h", "c"})
    state.set(name, at::zeros({sequences, width_}, options.dtype(acc)));
  return state;
}

std::vector<at::Tensor> Lstm::weights(at::ScalarType dtype) const {
  std::vector<at::Tensor> list;
  for (const at::Tensor* t : {&weight_ih_, &weight_hh_, &bias_ih_, &bias_hh_})
    if (t->defined()) list.push_back(t->to(dtype));
  return list;
}

at::Tensor Lstm::run(const at::Tensor& x, at::Tensor& h, at::Tensor& c) const {
  auto [y, h_last, c_last] =
      at::lstm(x, {h.unsqueeze(0), c.unsqueeze(0)}, weights(x.scalar_type()), bias_ih_.defined(),
               /*num_layers=*/1, /*dropout=*/0.0, /*train=*/false, /*bidirectional=*/false,
               /*batch_first=*/true);
  h = h_last.squeeze(0);
  c = c_last.squeeze(0);
  return y;
}

at::Tensor Lstm::run_naive(const at::Tensor& x, at::Tensor& h, at::Tensor& c) const {
  const std::vector<at::Tensor> w = weights(x.scalar_type());
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < x.size(1); ++t) {
    at::Tensor z = at::linear(x.select(1, t), w[0]) + at::linear(h, w[1]);
    if (w.size() == 4) z = z + w[2] + w[3];
    const std::vector<at::Tensor> parts = z.chunk(4, -1);  // i, f, g, o
    c = at::sigmoid(parts[1]) * c + at::sigmoid(parts[0]) * at::tanh(parts[2]);
    h = at::sigmoid(parts[3]) * at::tanh(c);
    outs.push_back(h);
  }
  if (outs.empty()) return at::zeros({x.size(0), 0, width_}, x.options());
  return at::stack(outs, 1);
}

// torch's form for ragged batches: the tokens by time, at each time those of the sequences that are
// long enough, longest first.
at::Tensor Lstm::run_packed(const at::Tensor& x, const at::Tensor& cu, at::Tensor& h,
                            at::Tensor& c) const {
  const int64_t* ends = cu.const_data_ptr<int64_t>();
  const auto length = [&](int64_t n) { return ends[n + 1] - ends[n]; };
  std::vector<int64_t> order;
  for (int64_t n = 0; n + 1 < cu.numel(); ++n)
    if (length(n) > 0) order.push_back(n);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t T = x.size(1);
  std::vector<int64_t> tokens, places(static_cast<size_t>(T)), batch_sizes;
  for (int64_t t = 0; !order.empty() && t < length(order[0]); ++t) {
    int64_t count = 0;
    for (const int64_t n : order) {
      if (length(n) <= t) break;
      places[static_cast<size_t>(ends[n] + t)] = static_cast<int64_t>(tokens.size());
      tokens.push_back(ends[n] + t);
      ++count;
    }
    batch_sizes.push_back(count);
  }
  const auto index = [](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong);
  };
  const at::Tensor rows = index(order);
  auto [y, h_last, c_last] = at::lstm(
      at::index_select(x.squeeze(0), 0, index(tokens)), index(batch_sizes),
      {at::index_select(h, 0, rows).unsqueeze(0), at::index_select(c, 0, rows).unsqueeze(0)},
      weights(x.scalar_type()), bias_ih_.defined(), /*num_layers=*/1, /*dropout=*/0.0,
      /*train=*/false, /*bidirectional=*/false);
  h = at::index_copy(h, 0, rows, h_last.squeeze(0));
  c = at::index_copy(c, 0, rows, c_last.squeeze(0));
  return at::index_select(y, 0, index(places)).unsqueeze(0);
}

at::Tensor Lstm::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t T = x.size(1), N = state.num_sequences();
  // In fp32 at least: what is added to c over many tokens would drown in bf16.
  const at::Tensor in = x.to(ops::acc_type(x.scalar_type()));
  at::Tensor h =
      state.given() ? state.read("h").to(in.scalar_type()) : at::zeros({N, width_}, in.options());
  at::Tensor c =
      state.given() ? state.read("c").to(in.scalar_type()) : at::zeros({N, width_}, in.options());
  const at::Tensor cu = ops::host_cu_seqlens(kName, state.cu_seqlens(), T);
  at::Tensor y;
  if (T == 0) {
    y = at::zeros({x.size(0), 0, width_}, in.options());
  } else if (!cu.defined()) {
    y = naive_ ? run_naive(in, h, c) : run(in, h, c);
  } else if (!naive_) {
    y = run_packed(in, cu, h, c);
  } else {
    std::vector<at::Tensor> outs, hs, cs;
    const int64_t* ends = cu.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) {
      at::Tensor h_n = h.narrow(0, n, 1), c_n = c.narrow(0, n, 1);
      outs.push_back(run_naive(in.slice(1, ends[n], ends[n + 1]), h_n, c_n));
      hs.push_back(h_n);
      cs.push_back(c_n);
    }
    y = at::cat(outs, 1);
    h = at::cat(hs, 0);
    c = at::cat(cs, 0);
  }
  if (state.given() && T > 0) {
    state.write("h", h);
    state.write("c", c);
  }
  y = y.to(x.scalar_type());
  return o_proj_ ? o_proj_->forward(y) : y;
}

MixerInfo lstm_info() {
  return {
      kName,
      "LSTM",
      "Hochreiter and Schmidhuber 1997",
      {"naive", "recurrent", "step"},
      {"cpu"},
      {
          {"width", nullptr,
           "size of the state; where it is not hidden_size, o_proj maps it back; default: "
           "hidden_size"},
          {"bias", true, "torch's two biases"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Lstm>(args); },
  };
}

}  // namespace gdn
