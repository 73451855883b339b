// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/linear.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "gdn/base/check.h"
#include "gdn/mixers/common/modules.h"

namespace gdn {
namespace {

using at::Tensor;

// Runs `f` with each library, and leaves the choice as it was.
template <typename F>
void for_each_backend(const F& f) {
  const ops::GemmBackend before = ops::gemm_backend();
  for (const auto backend : {ops::GemmBackend::kTorch, ops::GemmBackend::kOneDnn}) {
    ops::set_gemm_backend(backend);
    f(backend == ops::GemmBackend::kTorch ? "torch" : "onednn");
  }
  ops::set_gemm_backend(before);
}

TEST(LinearOp, EqualsDoublePrecisionWithGradientsOfBothOrders) {
  const Tensor x = at::randn({3, 37, 20}).set_requires_grad(true),
               w = at::randn({13, 20}).set_requires_grad(true),
               b = at::randn({13}).set_requires_grad(true);
  const Tensor dy = at::randn({3, 37, 13});
  // The gradient of the squares of the gradients: each product is differentiated twice.
  const auto run = [](const Tensor& y, const Tensor& dy, const std::vector<Tensor>& inputs) {
    std::vector<Tensor> all = {y};
    const auto first = torch::autograd::grad({y * y}, inputs, {dy}, /*retain_graph=*/true,
                                             /*create_graph=*/true);
    all.insert(all.end(), first.begin(), first.end());
    const auto second =
        torch::autograd::grad({first[0].square().sum() + first[1].square().sum()}, inputs);
    all.insert(all.end(), second.begin(), second.end());
    return all;
  };
  std::vector<Tensor> exact;
  {
    std::vector<Tensor> doubles;
    for (const Tensor& t : {x, w, b}) {
      doubles.push_back(t.detach().to(at::kDouble).set_requires_grad(true));
    }
    exact = run(at::linear(doubles[0], doubles[1], doubles[2]), dy.to(at::kDouble), doubles);
  }
  for_each_backend([&](const char* name) {
    const std::vector<Tensor> fast = run(ops::linear(x, w, b), dy, {x, w, b});
    ASSERT_EQ(fast.size(), exact.size());
    for (size_t i = 0; i < fast.size(); ++i) {
      const Tensor error = (fast[i].to(at::kDouble) - exact[i]).norm() / exact[i].norm();
      EXPECT_LT(error.item<double>(), 2e-6) << name << ", result " << i;
    }
  });
}

TEST(LinearOp, TakesOtherTypesAndStrides) {
  for_each_backend([&](const char* name) {
    const Tensor x = at::randn({6, 4, 10}).transpose(0, 1), w = at::randn({10, 7}).t();
    EXPECT_TRUE(at::allclose(ops::linear(x, w), at::linear(x, w), 1e-5, 1e-5)) << name;
    const Tensor xd = x.to(at::kDouble), wd = w.to(at::kDouble);
    EXPECT_TRUE(at::equal(ops::linear(xd, wd), at::linear(xd, wd))) << name;
    EXPECT_EQ(ops::linear(at::randn({0, 10}), w).sizes(), at::IntArrayRef({0, 7})) << name;
  });
}

TEST(FewRows, EqualsTheProductOfManyRows) {
  const c10::InferenceMode inference;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Tensor x = at::randn({1, 3, 48}).to(dtype);
    const std::vector<ops::Projection> projections = {
        {at::randn({11, 48}).to(dtype), {}},
        {at::randn({64, 48}).to(dtype), at::randn({64}).to(dtype)}};
    ASSERT_TRUE(ops::is_few_rows(x));
    const std::vector<Tensor> y = ops::few_rows(x, projections);
    for (size_t i = 0; i < y.size(); ++i) {
      std::optional<Tensor> bias;
      if (projections[i].bias.defined()) bias = projections[i].bias.to(at::kDouble);
      const Tensor exact =
          at::linear(x.to(at::kDouble), projections[i].weight.to(at::kDouble), bias);
      const double tolerance = dtype == at::kFloat ? 1e-5 : 1e-2;
      EXPECT_EQ(y[i].scalar_type(), dtype);
      EXPECT_TRUE(at::allclose(y[i].to(at::kDouble), exact, tolerance, tolerance)) << i;
    }
  }
  EXPECT_THROW(
      ops::few_rows(at::randn({1, 4}), std::vector<ops::Projection>{{at::randn({4, 5}), {}}}),
      Error);
}

TEST(FewRows, IsForCallsWithoutGradients) {
  EXPECT_FALSE(ops::is_few_rows(at::randn({1, 1, 8})));
  const c10::InferenceMode inference;
  EXPECT_TRUE(ops::is_few_rows(at::randn({1, 1, 8})));
  EXPECT_FALSE(ops::is_few_rows(at::randn({ops::kFewRows + 1, 8})));
  EXPECT_FALSE(ops::is_few_rows(at::randn({1, 8}).to(at::kDouble)));
}

TEST(LinearModule, DecodingSeesAChangedWeight) {
  Linear layer(16, 8, /*with_bias=*/true);
  const Tensor x = at::randn({1, 16}).to(at::kBFloat16);
  const auto run = [&] {
    const c10::InferenceMode inference;
    return layer.forward(x).to(at::kFloat);
  };
  const Tensor before = run();
  EXPECT_TRUE(at::equal(before, run()));
  {
    const c10::NoGradGuard no_grad;
    layer.weight.mul_(2);
    layer.bias.mul_(2);
  }
  EXPECT_TRUE(at::allclose(run(), 2 * before, 1e-2, 1e-2));
}

TEST(LinearModule, DrawsNoWeightsThatAFileWillGive) {
  const auto next_draw = [](const auto& make) {
    at::manual_seed(3);
    make();
    return at::randn({4});
  };
  const Tensor untouched = next_draw([] {});
  EXPECT_TRUE(at::equal(untouched, next_draw([] {
                          const SkipInitialization skip;
                          Linear layer(8, 8);
                        })));
  EXPECT_FALSE(SkipInitialization::active());
  EXPECT_FALSE(at::equal(untouched, next_draw([] { Linear layer(8, 8); })));
}

}  // namespace
}  // namespace gdn
