// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace gdn {
namespace {

TEST(Schedule, WarmsUpThenFollowsTheCosine) {
  const Schedule s{.lr = 1.0, .min_lr = 0.1, .warmup_iters = 10, .max_iters = 110};
  EXPECT_DOUBLE_EQ(s.lr_at(0, 0), 0.1);  // the first step moves already
  EXPECT_DOUBLE_EQ(s.lr_at(4, 0), 0.5);
  EXPECT_DOUBLE_EQ(s.lr_at(9, 0), 1.0);
  EXPECT_DOUBLE_EQ(s.lr_at(10, 0), 1.0);
  EXPECT_NEAR(s.lr_at(35, 0), 0.55 + 0.45 * std::sqrt(0.5), 1e-12);
  EXPECT_NEAR(s.lr_at(60, 0), 0.55, 1e-12);
  EXPECT_NEAR(s.lr_at(110, 0), 0.1, 1e-12);
  EXPECT_NEAR(s.lr_at(500, 0), 0.1, 1e-12);
  EXPECT_NEAR(s.lr_at(60, 1e9), 0.55, 1e-12) << "without a time limit the clock does not matter";
}

TEST(Schedule, FollowsTheClockWhenItIsFurtherOn) {
  const Schedule s{
      .lr = 1.0, .min_lr = 0.0, .warmup_iters = 0, .max_iters = 100, .max_seconds = 60};
  EXPECT_NEAR(s.lr_at(10, 30), 0.5, 1e-12);
  EXPECT_NEAR(s.lr_at(50, 10), 0.5, 1e-12);
  EXPECT_DOUBLE_EQ(s.progress(10, 30), 0.5);
  EXPECT_DOUBLE_EQ(s.progress(75, 30), 0.75);
  EXPECT_DOUBLE_EQ(s.progress(75, 90), 1.0);
  EXPECT_FALSE(s.done(99, 59.9));
  EXPECT_TRUE(s.done(100, 0));
  EXPECT_TRUE(s.done(0, 60));
}

TEST(Schedule, ShortRunsStayInTheWarmUp) {
  const Schedule s{.lr = 1.0, .min_lr = 0.1, .warmup_iters = 50, .max_iters = 30};
  EXPECT_DOUBLE_EQ(s.lr_at(29, 0), 0.6);
  EXPECT_TRUE(s.done(30, 0));
}

}  // namespace
}  // namespace gdn
