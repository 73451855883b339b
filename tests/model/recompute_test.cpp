// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/recompute.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace gdn {
namespace {

// Two outputs, of which the second depends on one input only, and one parameter.
std::vector<at::Tensor> work(const std::vector<at::Tensor>& in, const at::Tensor& w) {
  return {(in[0] * w).tanh() * in[1], in[1].exp()};
}

TEST(Recompute, GradientsAreThoseOfAutograd) {
  const auto a = at::randn({4, 3}).set_requires_grad(true),
             b = at::randn({4, 3}).set_requires_grad(true);
  const auto w = at::randn({3}).set_requires_grad(true);
  int calls = 0;
  const TensorsFn fn = [&](const std::vector<at::Tensor>& in) {
    ++calls;
    EXPECT_TRUE(c10::GradMode::is_enabled());  // both times the same algorithm
    return work(in, w);
  };
  const auto seed0 = at::randn({4, 3}), seed1 = at::randn({4, 3});
  const auto plain = work({a, b}, w);
  const auto expected = torch::autograd::grad(plain, {a, b, w}, {seed0, seed1});
  const auto outputs = recompute_in_backward(fn, {a, b}, {w});
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(at::equal(outputs[0], plain[0]));
  const auto found = torch::autograd::grad(outputs, {a, b, w}, {seed0, seed1});
  EXPECT_EQ(calls, 2);
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
}

TEST(Recompute, OnlyWhatIsWantedGetsAGradient) {
  const auto a = at::randn({4, 3}), b = at::randn({4, 3}).set_requires_grad(true);
  const auto w = at::randn({3}).set_requires_grad(true);
  const TensorsFn fn = [&](const std::vector<at::Tensor>& in) { return work(in, w); };
  const auto outputs = recompute_in_backward(fn, {a, b}, {w});
  outputs[1].sum().backward();  // w has no part in it
  EXPECT_TRUE(at::allclose(b.grad(), b.exp()));
  EXPECT_FALSE(w.grad().defined());
  EXPECT_FALSE(a.grad().defined());
}

TEST(Recompute, GradientsAddUpInLeaves) {
  const auto a = at::randn({4, 3}).set_requires_grad(true), b = at::randn({4, 3});
  const auto w = at::randn({3}).set_requires_grad(true);
  const TensorsFn fn = [&](const std::vector<at::Tensor>& in) { return work(in, w); };
  recompute_in_backward(fn, {a, b}, {w})[0].sum().backward();
  const auto once = w.grad().clone();
  recompute_in_backward(fn, {a, b}, {w})[0].sum().backward();
  EXPECT_TRUE(at::allclose(w.grad(), 2 * once));
}

TEST(Recompute, WithoutGradientsItIsTheFunction) {
  const c10::NoGradGuard no_grad;
  const auto a = at::randn({4, 3}), w = at::randn({3}).set_requires_grad(true);
  const TensorsFn fn = [&](const std::vector<at::Tensor>& in) {
    EXPECT_FALSE(c10::GradMode::is_enabled());
    return work(in, w);
  };
  EXPECT_FALSE(recompute_in_backward(fn, {a, a}, {w})[0].requires_grad());
}

}  // namespace
}  // namespace gdn
