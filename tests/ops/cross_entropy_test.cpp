// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/cross_entropy.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/tensor.h>

#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using testing::error_of;
using ::testing::HasSubstr;
using testing::normal;
using Tensors = std::vector<Tensor>;

TEST(CrossEntropyOps, EqualsTorchsInEveryDtype) {
  const Tensor targets = at::tensor({3, -100, 0, 36, 7, 7}, at::kLong);
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function(
        [&](const Tensors& t) {
          return Tensors{std::get<0>(cross_entropy(t[0], targets.view({2, 3})))};
        },
        [&](const Tensors& t) {
          const Tensor loss =
              at::cross_entropy_loss(t[0].flatten(0, 1), targets, {}, /*reduction=*/0);
          return Tensors{loss.view({2, 3})};
        },
        {normal({2, 3, 37}) * 3}, dtype, "cross_entropy");
  }
}

TEST(CrossEntropyOps, LogsumexpAndSlicesAndAnotherIgnoreIndex) {
  const Tensor wide = normal({4, 50}, at::kBFloat16), logits = wide.slice(-1, 0, 40);
  const Tensor targets = at::tensor({1, 39, 5, 0}, at::kLong);
  auto [loss, lse] = cross_entropy(logits, targets, /*ignore_index=*/5);
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  testing::expect_near(lse, at::logsumexp(logits.to(at::kDouble), -1), 1e-6, "logsumexp");
  EXPECT_EQ(loss[2].item<float>(), 0);
  EXPECT_GT(loss[1].item<float>(), 0);
  EXPECT_FALSE(
      std::get<1>(cross_entropy(normal({4, 40}).requires_grad_(), targets)).requires_grad());
}

TEST(CrossEntropyOps, ErrorsNameOpRuleAndValue) {
  const Tensor logits = normal({2, 5}, at::kFloat);
  EXPECT_THAT(
      error_of([&] {
        cross_entropy(logits, at::tensor({1, 5}, at::kLong));
      }),
      HasSubstr(
          "[cross_entropy] targets must be in [0, 5) or ignore_index (-100), got 5 in row 1"));
  EXPECT_THAT(error_of([&] {
                cross_entropy(logits, at::tensor({1, 2, 3}, at::kLong));
              }),
              HasSubstr("= [2], got [3]"));
  EXPECT_THAT(error_of([&] {
                cross_entropy(logits, at::tensor({1, 2}, at::kInt));
              }),
              HasSubstr("int64, got Int"));
}

}  // namespace
}  // namespace gdn::ops
