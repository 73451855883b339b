// SPDX-License-Identifier: Apache-2.0
// A weight in a loop against plain autograd.
#include "gdn/ops/loop_weight.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/mixers/common/loop_linear.h"

namespace gdn {
namespace {

using at::Tensor;
using Product = std::function<Tensor(const Tensor&)>;

constexpr int64_t kParts = 5;

Product plain(const Tensor& weight) {
  return [=](const Tensor& x) { return ops::linear(x, weight); };
}
Product looped(const Tensor& weight) {
  return [loop = ops::LoopWeight(weight)](const Tensor& x) { return loop.linear(x); };
}

Tensor leaf(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, dtype).set_requires_grad(true);
}

// Each part needs what the part before has left. x [B,parts,T,D], square weight -> a list of parts.
std::vector<Tensor> recurrence(const Tensor& x, const Product& product) {
  std::vector<Tensor> ys;
  Tensor left = x.select(1, 0);
  for (int64_t i = 0; i < x.size(1); ++i) {
    left = at::tanh(product(left + x.select(1, i)));
    ys.push_back(left);
  }
  return ys;
}

std::vector<Tensor> gradients(const Tensor& loss, const std::vector<Tensor>& inputs,
                              bool again = false) {
  return torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/again, /*create_graph=*/false,
                               /*allow_unused=*/true);
}

void expect_same(const std::vector<Tensor>& a, const std::vector<Tensor>& b, double limit = 1e-12) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].defined(), b[i].defined()) << i;
    if (!a[i].defined()) continue;
    EXPECT_LT(((a[i] - b[i]).norm() / b[i].norm()).item<double>(), limit) << i;
  }
}

TEST(LoopWeight, HasTheGradientsOfPlainProducts) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const Tensor x = leaf({2, kParts, 3, 6}, dtype), weight = leaf({6, 6}, dtype);
    const auto run = [&](const Product& product) {
      return gradients(at::stack(recurrence(x, product)).square().sum(), {x, weight});
    };
    expect_same(run(looped(weight)), run(plain(weight)), dtype == at::kDouble ? 1e-12 : 1e-5);
  }
}

// A loss that some parts, or none, or not even the weight's own products reach.
TEST(LoopWeight, TakesTheRowsOfThePartsThatContribute) {
  const Tensor x = leaf({2, kParts, 3, 6}), weight = leaf({6, 6});
  for (const std::vector<int64_t>& parts : std::vector<std::vector<int64_t>>{{0}, {1, 2}, {}}) {
    const auto run = [&](const Product& product) {
      const std::vector<Tensor> ys = recurrence(x, product);
      Tensor loss = x.sum();
      for (const int64_t i : parts) loss = loss + ys[i].square().sum();
      return gradients(loss, {x, weight});
    };
    expect_same(run(looped(weight)), run(plain(weight)));
  }
  // A part whose own gradient is undefined stays in the graph beside one that has a gradient.
  struct Drop : torch::autograd::Function<Drop> {
    static Tensor forward(torch::autograd::AutogradContext*, const Tensor& y) { return y.clone(); }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   torch::autograd::variable_list) {
      return {Tensor()};
    }
  };
  const auto run = [&](const Product& product) {
    const Tensor dropped = Drop::apply(product(x.select(1, 0)));
    return gradients(dropped.sum() + product(x.select(1, 1)).square().sum(), {weight});
  };
  expect_same(run(looped(weight)), run(plain(weight)));
}

TEST(LoopWeight, LeavesFrozenWeightsAlone) {
  const Tensor x = leaf({2, kParts, 3, 6}), frozen = at::randn({6, 6}, at::kDouble);
  const auto of_input = [&](const Product& product) {
    return gradients(at::stack(recurrence(x, product)).square().sum(), {x});
  };
  expect_same(of_input(looped(frozen)), of_input(plain(frozen)));
  // A frozen weight with an adapter of low rank, the input without a gradient.
  const Tensor data = x.detach(), down = leaf({2, 6}), up = leaf({6, 2});
  const auto of_adapter = [&](Product (*make)(const Tensor&)) {
    const Product product = make(frozen + up.mm(down));
    return gradients(at::stack(recurrence(data, product)).square().sum(), {down, up});
  };
  expect_same(of_adapter(&looped), of_adapter(&plain));
}

TEST(LoopWeight, BackwardPassesDoNotMix) {
  const Tensor x = leaf({2, kParts, 3, 6}), weight = leaf({6, 6});
  const auto loss = [&](const Product& product) {
    return at::stack(recurrence(x, product)).square().sum();
  };
  const std::vector<Tensor> expected = gradients(loss(plain(weight)), {x, weight});
  const Tensor kept = loss(looped(weight));
  gradients(kept, {x}, /*again=*/true);  // needs no rows
  expect_same(gradients(kept, {x, weight}, true), expected);
  expect_same(gradients(kept, {x, weight}, true), expected);
  // One that fails half-way, when some products have left their rows.
  const Product product = looped(weight);
  bool fails = true;
  const Tensor first = product(x.select(1, 0));
  first.register_hook([&](const Tensor&) {
    if (fails) throw std::runtime_error("half-way");
  });
  const Tensor whole = product(at::tanh(first)).square().sum();
  EXPECT_THROW(gradients(whole, {weight}, true), std::runtime_error);
  fails = false;
  const Tensor same =
      ops::linear(at::tanh(ops::linear(x.select(1, 0), weight)), weight).square().sum();
  expect_same(gradients(whole, {weight}), gradients(same, {weight}));
}

TEST(LoopWeight, HasGradientsOfGradients) {
  const Tensor x = leaf({2, kParts, 3, 6}), weight = leaf({6, 6});
  const auto run = [&](const Product& product) {
    const std::vector<Tensor> first =
        torch::autograd::grad({at::stack(recurrence(x, product)).square().sum()}, {x, weight}, {},
                              /*retain_graph=*/true, /*create_graph=*/true);
    return gradients(first[0].square().sum() + first[1].square().sum(), {x, weight});
  };
  expect_same(run(looped(weight)), run(plain(weight)), 1e-11);
}

TEST(LoopWeight, NoticesAChangedWeight) {
  const Tensor x = leaf({2, 3, 6}), weight = leaf({6, 6});
  const Tensor loss = looped(weight)(x).sum();
  gradients(loss, {x, weight}, /*again=*/true);
  {
    const c10::NoGradGuard no_grad;
    weight.mul_(2);
  }
  EXPECT_THROW(gradients(loss, {x, weight}), c10::Error);
}

// More rows than are multiplied at once, and parts that are as many on their own.
TEST(LoopWeight, AddsUpManyRows) {
  const Tensor weight = leaf({6, 6});
  for (const auto& [rows, parts] : {std::pair{300, 9}, {1500, 2}}) {
    const Tensor x = leaf({rows, parts, 2, 6});
    const auto run = [&](const Product& product) {
      return gradients(at::stack(recurrence(x, product)).square().sum(), {x, weight});
    };
    expect_same(run(looped(weight)), run(plain(weight)));
  }
}

TEST(LoopWeight, TakesTheWeightsGradientInOneProduct) {
  const Tensor weight = leaf({6, 6});
  const ops::LoopWeight loop(weight);
  Tensor loss = at::zeros({}, at::kDouble);
  for (int64_t i = 0; i < kParts; ++i)
    loss = loss + loop.linear(at::randn({3, 6}, at::kDouble)).square().sum();
  static thread_local int products = 0;
  products = 0;
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback([](const at::RecordFunction& f) {
                                   if (std::string_view(f.name()) == "aten::mm") ++products;
                                   return std::unique_ptr<at::ObserverContext>();
                                 }).scopes({at::RecordScope::FUNCTION}));
  gradients(loss, {weight});
  at::removeCallback(handle);
  EXPECT_EQ(products, 1);
}

TEST(LoopLinear, IsItsLayersOneByOne) {
  Linear a(6, 4), b(6, 3);
  const Tensor x = at::randn({2, 8, 6}).set_requires_grad(true);
  const auto check = [&](at::ScalarType dtype, double limit) {
    const Tensor input = x.to(dtype);
    const LoopLinear loop({&a, &b}, input);
    std::vector<Tensor> first, second;
    for (const Tensor& part : input.split(4, 1)) {
      const std::vector<Tensor> ys = loop.forward(part);
      first.push_back(ys[0]);
      second.push_back(ys[1]);
    }
    std::vector<Tensor> found = {at::cat(first, 1), at::cat(second, 1)};
    std::vector<Tensor> expected = {a.forward(input), b.forward(input)};
    if (c10::GradMode::is_enabled()) {
      for (std::vector<Tensor>* ys : {&found, &expected}) {
        const Tensor loss = (*ys)[0].square().sum() + (*ys)[1].pow(3).sum();
        for (const Tensor& g : gradients(loss, {x, a.weight, b.weight})) ys->push_back(g);
      }
    }
    expect_same(found, expected, limit);
  };
  check(at::kFloat, 1e-5);
  check(at::kBFloat16, 2e-2);
  const c10::NoGradGuard no_grad;
  check(at::kFloat, 1e-5);
  const LoopLinear decoding({&a, &b}, x.narrow(1, 0, 2));
  expect_same(decoding.forward(x.narrow(1, 0, 1)),
              {a.forward(x.narrow(1, 0, 1)), b.forward(x.narrow(1, 0, 1))}, 1e-5);
  Linear biased(6, 4, /*with_bias=*/true);
  EXPECT_THROW(LoopLinear({&biased}, x), Error);
}

}  // namespace
}  // namespace gdn
