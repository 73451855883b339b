// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using at::Tensor;

double relative_error(const Tensor& a, const Tensor& b) {
  return ((a.to(at::kDouble) - b).norm() / b.norm()).item<double>();
}

// More rows than a chunk has, and a last chunk that is not full.
TEST(LinearCrossEntropy, EqualsTheLossOfAllLogitsWithGradients) {
  constexpr int64_t kRows = 777, kWidth = 24, kVocab = 9001;
  const Tensor t = at::randint(kVocab, {kRows}, at::kLong);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Tensor h = at::randn({kRows, kWidth}).to(dtype).set_requires_grad(true);
    const Tensor w =
        at::randn({kVocab, kWidth}).to(dtype).to(dtype == at::kDouble ? at::kDouble : at::kFloat);
    w.set_requires_grad(true);
    const Tensor hd = h.detach().to(at::kDouble).set_requires_grad(true),
                 wd = w.detach().to(at::kDouble).set_requires_grad(true);
    const Tensor exact = at::cross_entropy_loss(at::linear(hd, wd), t) * 3;
    const Tensor loss = ops::linear_cross_entropy(h, w, t) * 3;
    const auto expected = torch::autograd::grad({exact}, {hd, wd});
    const auto actual = torch::autograd::grad({loss}, {h, w});
    const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 2e-2;
    EXPECT_LT(relative_error(loss.detach(), exact.detach()), tolerance);
    for (int i = 0; i < 2; ++i) {
      EXPECT_LT(relative_error(actual[i], expected[i]), tolerance) << i;
    }
    EXPECT_EQ(actual[0].scalar_type(), dtype);
    EXPECT_EQ(actual[1].scalar_type(), w.scalar_type());
    const c10::NoGradGuard no_grad;
    EXPECT_LT(relative_error(ops::linear_cross_entropy(h, w, t) * 3, exact.detach()), tolerance);
  }
}

TEST(LinearCrossEntropy, RefusesWrongShapes) {
  const Tensor h = at::randn({4, 8}), w = at::randn({10, 8});
  EXPECT_THROW(ops::linear_cross_entropy(h, at::randn({10, 7}), at::randint(10, {4}, at::kLong)),
               Error);
  EXPECT_THROW(ops::linear_cross_entropy(h, w, at::randint(10, {5}, at::kLong)), Error);
}

}  // namespace
}  // namespace gdn
