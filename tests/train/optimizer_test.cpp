// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/optimizer.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "gdn/base/check.h"

namespace gdn {
namespace {

NamedTensors some_parameters() {
  NamedTensors p = {{"model.layers.0.attn.q_proj.weight", at::randn({5, 7})},
                    {"model.layers.0.attn.A_log", at::randn({1, 1, 4, 1})},
                    {"model.layers.0.attn.dt_bias", at::randn({4, 2})},
                    {"model.norm.weight", at::randn({7})},
                    {"unused.weight", at::randn({3, 3})}};
  for (auto& [name, t] : p) t.requires_grad_(true);
  return p;
}

void set_gradients(const NamedTensors& parameters) {
  for (auto& [name, p] : parameters)
    if (name != "unused.weight") p.mutable_grad() = at::randn(p.sizes());
}

// AdamW as the paper writes it, in double.
struct Reference {
  at::Tensor p, m, v;
  void step(const at::Tensor& grad, int64_t t, double lr, const AdamWOptions& o, bool decay) {
    m = o.beta1 * m + (1 - o.beta1) * grad;
    v = o.beta2 * v + (1 - o.beta2) * grad * grad;
    const at::Tensor m_hat = m / (1 - std::pow(o.beta1, t)), v_hat = v / (1 - std::pow(o.beta2, t));
    p = p - lr * (m_hat / (v_hat.sqrt() + o.eps) + (decay ? o.weight_decay : 0.0) * p);
  }
};

TEST(AdamW, EqualsTheFormulaWithClippingAndDecayGroups) {
  const AdamWOptions options{
      .beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.3, .grad_clip = 1.0};
  const NamedTensors parameters = some_parameters();
  std::vector<Reference> references;
  for (const auto& [name, p] : parameters) {
    const at::Tensor x = p.detach().to(at::kDouble).clone();
    references.push_back({x, at::zeros_like(x), at::zeros_like(x)});
  }
  AdamW adamw(parameters, options);
  for (int64_t t = 1; t <= 5; ++t) {
    set_gradients(parameters);
    if (t == 3)  // a small gradient is not scaled up
      for (const auto& [name, p] : parameters)
        if (p.grad().defined()) p.mutable_grad().mul_(1e-3);
    double squares = 0;
    for (const auto& [name, p] : parameters)
      if (p.grad().defined()) squares += p.grad().to(at::kDouble).square().sum().item<double>();
    const double norm = adamw.grad_norm(), scale = std::min(1.0, options.grad_clip / norm);
    EXPECT_NEAR(norm, std::sqrt(squares), 1e-5 * norm);
    for (size_t i = 0; i + 1 < parameters.size(); ++i)
      references[i].step(parameters[i].second.grad().to(at::kDouble) * scale, t, 0.1, options,
                         /*decay=*/i == 0);
    adamw.step(0.1, norm);
    adamw.zero_grad();
    for (size_t i = 0; i < parameters.size(); ++i) {
      EXPECT_TRUE(
          at::allclose(parameters[i].second.detach().to(at::kDouble), references[i].p, 1e-5, 1e-6))
          << parameters[i].first << " at step " << t;
      EXPECT_FALSE(parameters[i].second.grad().defined());
    }
  }
  EXPECT_EQ(adamw.steps(), 5);
}

TEST(AdamW, StateGoesOnWhereItStopped) {
  const NamedTensors a = some_parameters();
  NamedTensors b;
  for (const auto& [name, p] : a) b.emplace_back(name, p.detach().clone().requires_grad_(true));
  AdamW first(a, {});
  set_gradients(a);
  first.step(0.1, 10.0);

  AdamW second(b, {});
  for (size_t i = 0; i < a.size(); ++i) b[i].second.detach().copy_(a[i].second.detach());
  second.load_state(first.state(), first.steps());
  set_gradients(a);
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].second.grad().defined()) b[i].second.mutable_grad() = a[i].second.grad().clone();
  first.step(0.1, 1.0);
  second.step(0.1, 1.0);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(a[i].second.equal(b[i].second)) << a[i].first;

  NamedTensors state = first.state();
  state[0].second = at::zeros({2});
  EXPECT_THROW(second.load_state(state, 1), Error);
  state.erase(state.begin());
  EXPECT_THROW(second.load_state(state, 1), Error);
}

}  // namespace
}  // namespace gdn
