// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

namespace gdn {
namespace {

class Parallel : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_num_threads(GetParam()); }
  void TearDown() override { set_num_threads(before_); }
  const int before_ = num_threads();
};

// Each index of [3, n) exactly once.
bool covers_once(int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> counts(n);
  parallel_for(3, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++counts[i];
  });
  for (int64_t i = 0; i < n; ++i) {
    if (counts[i] != (i >= 3 ? 1 : 0)) return false;
  }
  return true;
}

TEST_P(Parallel, CoversTheRangeOnce) {
  for (int call = 0; call < 200; ++call) {
    EXPECT_TRUE(covers_once(4 + call % 50, 1 + call % 7)) << call;
  }
  parallel_for(5, 5, 1, [](int64_t, int64_t) { ADD_FAILURE() << "an empty range"; });
}

TEST_P(Parallel, ExceptionsReachTheCallerAndLeaveItUsable) {
  for (int call = 0; call < 20; ++call) {
    EXPECT_THROW(parallel_for(0, 64, 1,
                              [](int64_t, int64_t end) {
                                if (end > 32) throw std::runtime_error("late");
                              }),
                 std::runtime_error);
    EXPECT_TRUE(covers_once(40, 1));
  }
}

TEST_P(Parallel, CallsFromInsideRunSerially) {
  std::atomic<int> inner{0};
  parallel_for(0, 8, 1, [&](int64_t begin, int64_t end) {
    const auto self = std::this_thread::get_id();
    for (int64_t i = begin; i < end; ++i) {
      parallel_for(0, 10, 1, [&](int64_t b, int64_t e) {
        EXPECT_EQ(std::this_thread::get_id(), self);
        inner += static_cast<int>(e - b);
      });
    }
  });
  EXPECT_EQ(inner, 80);
}

TEST_P(Parallel, SeveralCallersAtOnce) {
  std::vector<std::thread> callers;
  std::atomic<int> failures{0};
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      for (int call = 0; call < 50; ++call) failures += covers_once(30, 1) ? 0 : 1;
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(failures, 0);
}

TEST_P(Parallel, AForkedProcessWorksOnAndExits) {
  EXPECT_TRUE(covers_once(50, 1));  // the threads are there
  testing::FLAGS_gtest_death_test_style = "fast";
  EXPECT_EXIT(std::exit(covers_once(50, 1) ? 7 : 8), testing::ExitedWithCode(7), "");
}

INSTANTIATE_TEST_SUITE_P(Threads, Parallel, testing::Values(1, 2, 4));

}  // namespace
}  // namespace gdn
