// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/timing.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "gdn/base/parallel.h"

namespace gdn::bench {
namespace {

// A clock that the functions under test move on.
double fake_seconds = 0;
double fake_now() { return fake_seconds; }

struct Calls {
  std::string order;
  std::vector<std::function<void()>> functions(std::vector<std::vector<double>> seconds) {
    std::vector<std::function<void()>> list;
    for (size_t i = 0; i < seconds.size(); ++i) {
      list.emplace_back([this, i, taken = seconds[i], call = size_t{0}]() mutable {
        order += static_cast<char>('a' + i);
        fake_seconds += taken[call++ % taken.size()];
      });
    }
    return list;
  }
};

TEST(Median, IsTheMiddleOne) {
  EXPECT_EQ(median({7}), 7);
  EXPECT_EQ(median({9, 1, 5}), 5);
  EXPECT_EQ(median({4, 1, 3, 2}), 3);
}

TEST(MediansInTurn, CallOneAfterTheOther) {
  Calls calls;
  const auto medians =
      medians_in_turn(calls.functions({{3}, {5}}), {.seconds = 40, .patience = 1, .now = fake_now});
  EXPECT_EQ(medians, (std::vector<double>{3, 5}));
  EXPECT_EQ(calls.order, "abababababab");  // 40 s are five times 8
}

TEST(MediansInTurn, TakeThreeCallsAtLeast) {
  Calls calls;
  // The first call only warms up.
  const auto medians = medians_in_turn(calls.functions({{1000, 4, 2, 9}}),
                                       {.seconds = 0, .patience = 1, .now = fake_now});
  EXPECT_EQ(medians, std::vector<double>{4});
  EXPECT_EQ(calls.order, "aaaa");
}

TEST(MediansInTurn, WarmUpBeforeEachCallIfAsked) {
  Calls calls;
  const auto medians =
      medians_in_turn(calls.functions({{1, 50, 2}, {60, 70, 6}}),
                      {.seconds = 0, .patience = 1, .warm = true, .now = fake_now});
  EXPECT_EQ(calls.order, "abaabbaabbaabb");
  EXPECT_EQ(medians, (std::vector<double>{2, 60}));
}

TEST(MediansInTurn, CallEachForAStretch) {
  Calls calls;
  const auto medians = medians_in_turn(
      calls.functions({{1}, {3}}), {.seconds = 0, .patience = 1, .stretch = 6, .now = fake_now});
  // One call each, then by turns one that does not count and 6 s of those that do.
  EXPECT_EQ(calls.order,
            "ab"
            "aaaaaaa"
            "bbb"
            "aaaaaaa"
            "bbb");
  EXPECT_EQ(medians, (std::vector<double>{1, 3}));
}

TEST(MediansInTurn, OfNothingAreNone) { EXPECT_TRUE(medians_in_turn({}, {}).empty()); }

TEST(MediansInTurn, EndInTimeWhereCallsTakeNone) {
  int64_t calls = 0;
  const auto medians = medians_in_turn({[&calls] { ++calls; }},
                                       {.seconds = 0.01, .patience = 1, .now = [] { return 0.0; }});
  EXPECT_EQ(medians, std::vector<double>{0});
  EXPECT_GE(calls, 4);
}

TEST(MediansInTurn, WaitForCoresAloneForALimitedTime) {
  Calls calls;
  const TimedCalls before = timed_calls();
  medians_in_turn(calls.functions({{1}}), {.seconds = 10, .patience = 3, .now = fake_now});
  const TimedCalls after = timed_calls();
  const auto timed = static_cast<int64_t>(calls.order.size()) - 1;
  EXPECT_GE(timed, 10);
  EXPECT_LE(timed, 30);
  EXPECT_EQ(after.all - before.all, timed);
  const int64_t alone = after.alone - before.alone;
  EXPECT_LE(alone, timed);
  // It ends before its time where enough had their cores alone.
  EXPECT_TRUE(timed == 10 || timed == 30 || alone >= 3) << timed << " " << alone;
}

TEST(CoreShare, IsAShare) {
  const int threads = num_threads();
  for (const int n : {1, 2}) {
    set_num_threads(n);
    const double share = core_share();
    EXPECT_GE(share, 0) << n;
    EXPECT_LE(share, 1) << n;
  }
  set_num_threads(1);
  EXPECT_GT(core_share(), 0);
  set_num_threads(static_cast<int>(allowed_cpus().size()) + 1);
  EXPECT_EQ(core_share(), 0);
  set_num_threads(threads);
}

}  // namespace
}  // namespace gdn::bench
