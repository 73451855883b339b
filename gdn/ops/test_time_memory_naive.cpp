// SPDX-License-Identifier: Apache-2.0
// The definition of test-time memories, token by token on whole weight matrices, and reading a
// memory that does not change. Inner gradients are autograd's.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "gdn/base/check.h"
#include "gdn/ops/common.h"
#include "gdn/ops/test_time_memory.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using Layers = std::vector<Tensor>;  // [N,H,in (+1),out]

Layers split(const Tensor& flat, int64_t D, const MemoryConfig& config) {
  std::vector<int64_t> rows, sizes;
  for (int64_t l = 0; l < config.depth; ++l) {
    rows.push_back((l == 0 ? D : config.hidden) + (config.bias ? 1 : 0));
    sizes.push_back(rows.back() * (l + 1 == config.depth ? D : config.hidden));
  }
  // Cut at once: the gradient of a slice is as long as what it was cut from.
  Layers layers = flat.split_with_sizes(sizes, 2);
  for (int64_t l = 0; l < config.depth; ++l) {
    layers[l] = layers[l].unflatten(2, {rows[l], sizes[l] / rows[l]});
  }
  return layers;
}

Tensor join(const Layers& layers) {
  Layers flat;
  for (const Tensor& layer : layers) flat.push_back(layer.flatten(2));
  return at::cat(flat, 2);
}

// f at weights W for x [N,H,T,D]; norm_weight and norm_bias [H,D].
Tensor apply(const Layers& W, Tensor x, const Tensor& norm_weight, const Tensor& norm_bias,
             const MemoryConfig& config) {
  const Tensor residual = x;
  for (size_t l = 0; l < W.size(); ++l) {
    if (config.bias) {
      auto sizes = x.sizes().vec();
      sizes.back() = 1;
      x = at::cat({x, at::ones(sizes, x.options())}, 3);
    }
    x = at::matmul(x, W[l]);
    if (l + 1 == W.size()) break;
    x = config.activation == "silu" ? at::silu(x) : at::gelu(x, "tanh");
  }
  if (!norm_weight.defined()) return x;
  const Tensor centred = x - x.mean(-1, /*keepdim=*/true);
  const Tensor hat =
      centred * at::rsqrt((centred * centred).mean(-1, /*keepdim=*/true) + config.norm_eps);
  return residual + hat * norm_weight.unsqueeze(1) + norm_bias.unsqueeze(1);
}

// One sequence, or several at the same position: inputs [N,T,H,..], gates [N,T,H], in double.
struct Run {
  const MemoryTensors& in;
  const MemoryConfig& config;
  bool keep_graph;

  Tensor token(const Tensor& x, int64_t t) const { return x.select(1, t).unsqueeze(2); }
  Tensor gate(const Tensor& x, int64_t t) const {
    return x.select(1, t).unsqueeze(2).unsqueeze(3);  // [N,H,1,1]
  }
  Tensor settled(const Tensor& x) const { return keep_graph ? x : x.detach(); }

  // Gradients of the token's loss at W, each cut to the norm `clip`.
  Layers gradients(const Layers& W, int64_t t) const {
    Layers at;
    for (const Tensor& w : W) at.push_back(w.requires_grad() ? w : w.detach().requires_grad_());
    const Tensor error =
        apply(at, token(in.k, t), in.norm_weight, in.norm_bias, config) - token(in.v, t);
    const Tensor loss = (error * error).sum() * (config.loss_scale / 2);
    Layers grads = torch::autograd::grad({loss}, at, {}, /*retain_graph=*/keep_graph,
                                         /*create_graph=*/keep_graph);
    if (config.clip > 0) {
      for (Tensor& g : grads) {
        const Tensor norm = (g * g).sum(at::IntArrayRef{2, 3}, /*keepdim=*/true).sqrt();
        g = g * (config.clip / norm).clamp_max(1.0);
      }
    }
    return grads;
  }

  MemoryResult run(int64_t position, const Tensor& memory, const Tensor& momentum,
                   const Tensor& gradient_at) const {
    const int64_t D = in.q.size(3), T = in.q.size(1);
    Layers M = split(memory, D, config);
    Layers S = split(momentum.defined() ? momentum : at::zeros_like(memory), D, config);
    const bool ttt = config.rule == "ttt";
    Layers G = gradient_at.defined() ? split(gradient_at, D, config) : M;
    const Layers anchor = in.anchor.defined() ? split(in.anchor.unsqueeze(0), D, config) : Layers();
    const int64_t chunk = config.sequential ? 1 : config.chunk;
    std::vector<Tensor> outs;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t place = (position + t) % chunk;
      if (place == 0) {
        G = M;
        if (ttt) {
          for (Tensor& sum : S) sum = at::zeros_like(sum);
        }
      }
      const Layers before = M;
      const Layers grads = gradients(ttt ? M : G, t);
      const Tensor rate = gate(in.rate, t);
      Layers read;
      for (size_t l = 0; l < M.size(); ++l) {
        if (ttt) {
          S[l] = settled(S[l] + rate * grads[l]);
          read.push_back(M[l] - in.tau[place] * S[l]);
        } else {
          const Tensor step = -rate * grads[l];
          S[l] = settled(in.eta.defined() ? gate(in.eta, t) * S[l] + step : step);
          Tensor kept = anchor.empty() ? M[l] : M[l] - anchor[l];
          if (in.alpha.defined()) kept = (1 - gate(in.alpha, t)) * kept;
          if (!anchor.empty()) kept = anchor[l] + kept;
          M[l] = settled(kept + S[l]);
          read.push_back(config.read_before ? before[l] : M[l]);
        }
      }
      outs.push_back(
          settled(apply(read, token(in.q, t), in.norm_weight, in.norm_bias, config).squeeze(2)));
      if (ttt && place + 1 == chunk) {
        for (size_t l = 0; l < M.size(); ++l) {
          M[l] = settled(read[l]);
          S[l] = at::zeros_like(S[l]);
        }
      }
    }
    if ((position + T) % chunk == 0 && T > 0) G = M;
    MemoryResult result;
    result.o = T > 0 ? at::stack(outs, 1) : in.q;
    result.memory = join(M);
    if (has_momentum(config, in.eta.defined())) result.momentum = join(S);
    if (has_gradient_at(config)) result.gradient_at = join(G);
    return result;
  }
};

}  // namespace

Tensor test_time_memory_read(const Tensor& q, const Tensor& weights, const MemoryTensors& inputs,
                             const MemoryConfig& config) {
  const at::ScalarType acc = acc_type(q.scalar_type());
  const Tensor x = q.to(acc).transpose(1, 2);  // [N,H,T,D]
  auto cast = [&](const Tensor& t) { return t.defined() ? t.to(acc) : t; };
  return apply(split(weights, q.size(3), config), x, cast(inputs.norm_weight),
               cast(inputs.norm_bias), config)
      .transpose(1, 2)
      .to(q.scalar_type());
}

namespace naive {

MemoryResult test_time_memory(const MemoryTensors& inputs, const MemoryConfig& config) {
  const bool keep_graph = c10::GradMode::is_enabled();
  c10::AutoGradMode with_grad(true);
  MemoryTensors in = inputs;
  for (Tensor* t : {&in.q, &in.k, &in.v, &in.rate, &in.eta, &in.alpha, &in.tau, &in.anchor,
                    &in.norm_weight, &in.norm_bias, &in.memory, &in.momentum, &in.gradient_at}) {
    if (!t->defined()) continue;
    *t = t->to(at::kDouble);
    if (!keep_graph) *t = t->detach();
  }
  const Tensor cu = host_cu_seqlens("test_time_memory", given(inputs.cu_seqlens), in.q.size(1));
  const int64_t N = cu.defined() ? cu.size(0) - 1 : in.q.size(0);
  std::vector<int64_t> positions(N, 0);
  if (inputs.position.defined()) {
    const int64_t* p = inputs.position.const_data_ptr<int64_t>();
    positions.assign(p, p + N);
  }
  bool together = !cu.defined();
  for (const int64_t p : positions) together = together && p == positions[0];
  MemoryResult result;
  if (together) {
    result = Run{in, config, keep_graph}.run(N > 0 ? positions[0] : 0, in.memory, in.momentum,
                                             in.gradient_at);
  } else {
    std::vector<Tensor> o, memory, momentum, gradient_at;
    for (int64_t n = 0; n < N; ++n) {
      MemoryTensors one = in;
      for (Tensor* t : {&one.q, &one.k, &one.v, &one.rate, &one.eta, &one.alpha}) {
        if (!t->defined()) continue;
        *t = cu.defined() ? t->slice(1, cu[n].item<int64_t>(), cu[n + 1].item<int64_t>())
                          : t->narrow(0, n, 1);
      }
      auto row = [&](const Tensor& t) { return t.defined() ? t.narrow(0, n, 1) : t; };
      const MemoryResult part = Run{one, config, keep_graph}.run(
          positions[n], row(in.memory), row(in.momentum), row(in.gradient_at));
      o.push_back(part.o);
      memory.push_back(part.memory);
      if (part.momentum.defined()) momentum.push_back(part.momentum);
      if (part.gradient_at.defined()) gradient_at.push_back(part.gradient_at);
    }
    result.o = at::cat(o, cu.defined() ? 1 : 0);
    result.memory = at::cat(memory, 0);
    if (!momentum.empty()) result.momentum = at::cat(momentum, 0);
    if (!gradient_at.empty()) result.gradient_at = at::cat(gradient_at, 0);
  }
  const at::ScalarType acc = acc_type(inputs.q.scalar_type());
  result.o = result.o.to(inputs.q.scalar_type());
  for (Tensor* t : {&result.memory, &result.momentum, &result.gradient_at})
    if (t->defined()) *t = t->to(acc);
  return result;
}

}  // namespace naive
}  // namespace gdn::ops
