// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/adapt.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "gdn/base/check.h"
#include "tests/model/support.h"

namespace gdn {
namespace {

using ::testing::HasSubstr;

TEST(Adapt, LossesAreThoseOfWholeOfPackedAndOfContinuedWindows) {
  testing::seed(4);
  CausalLM model(testing::tiny_config({testing::gdn_block(), testing::attention_block()}));
  const at::Tensor random = testing::random_ids(1, 48);
  const std::vector<int64_t> ids(random.const_data_ptr<int64_t>(),
                                 random.const_data_ptr<int64_t>() + 48);
  const int64_t window = 10, T = 47;
  const auto losses = adapt_losses(model, ids, window, 3);
  ASSERT_EQ(losses.size(), 4u);
  EXPECT_EQ(losses[0].begin, 0);
  EXPECT_EQ(losses[0].end, 10);  // five windows in three parts
  EXPECT_EQ(losses[1].end, 30);
  EXPECT_EQ(losses[2].end, T);
  EXPECT_EQ(losses[3].begin, 0);
  EXPECT_EQ(losses[3].end, T);

  const c10::NoGradGuard no_grad;
  const at::Tensor in = random.narrow(1, 0, T), out = random.narrow(1, 1, T);
  EXPECT_NEAR(losses[3].carried, model.loss(in, out).item<double>(), 1e-5);
  ModelContext packed;
  packed.seqs.cu_seqlens = at::tensor({0, 10, 20, 30, 40, 47}, at::kLong);
  EXPECT_NEAR(losses[3].reset, model.loss(in, out, packed).item<double>(), 1e-5);
  // The second and third windows, each behind the first.
  double sum = 0;
  for (const int64_t t : {10, 20}) {
    const at::Tensor part = at::cat({in.narrow(1, 0, 10), in.narrow(1, t, 10)}, 1);
    at::Tensor targets = at::cat({out.narrow(1, 0, 10), out.narrow(1, t, 10)}, 1).clone();
    targets.narrow(1, 0, 10).fill_(-100);
    sum += model.loss(part, targets).item<double>() / 2;
  }
  EXPECT_NEAR(losses[1].frozen, sum, 1e-5);
  EXPECT_NE(losses[1].frozen, losses[1].reset);
  EXPECT_NE(losses[1].frozen, losses[1].carried);
  EXPECT_THAT(adapt_table(losses), HasSubstr("10-30"));
}

TEST(Adapt, RejectsShortDocuments) {
  CausalLM model(testing::tiny_config());
  try {
    adapt_losses(model, {1, 2, 3}, 8, 2);
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("must have at least 17 tokens"));
  }
}

}  // namespace
}  // namespace gdn
