// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/attend_step.h"

#include <limits>

#include "tests/kernels/support.h"

namespace gdn {
namespace {

template <typename T>
struct Problem {
  AttendStepParams p;
  std::vector<T> q, k, v, o;

  // Keys and values lie in wider rows, as in a cache of which some tokens are seen.
  Problem(int64_t B, int64_t S, int64_t H, int64_t HK, int64_t K, int64_t V) {
    p.B = B;
    p.S = S;
    p.H = H;
    p.HK = HK;
    p.K = K;
    p.V = V;
    p.dtype = kDTypeOf<T>;
    p.scale = 0.7;
    p.k_stride = HK * K + 3;
    p.k_batch = (S + 2) * p.k_stride;
    p.v_stride = HK * V + 1;
    p.v_batch = (S + 1) * p.v_stride;
    q = testing::random_normal<T>(B * H * K, 1);
    k = testing::random_normal<T>(B * p.k_batch, 2);
    v = testing::random_normal<T>(B * p.v_batch, 3);
    o.resize(B * H * V);
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
  }
};

template <typename T>
class AttendStepTest : public ::testing::Test {};
using Dtypes = ::testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(AttendStepTest, Dtypes);

TYPED_TEST(AttendStepTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([&](const std::string& target) {
    for (const int64_t S : {1, 3, 256, 700}) {
      for (const auto& [H, HK, K, V] :
           {std::tuple<int64_t, int64_t, int64_t, int64_t>{2, 2, 64, 64},
            {6, 2, 20, 100},
            {1, 1, 1, 1}}) {
        Problem<T> problem(2, S, H, HK, K, V);
        attend_step(problem.p, problem.o.data());
        std::vector<double> expected(problem.o.size());
        attend_step_naive(problem.p, expected.data());
        testing::expect_close(problem.o, expected, testing::tolerance<T>(),
                              str_cat(target, " S ", S, " H ", H, " K ", K));
      }
    }
  });
}

TEST(AttendStep, KeepsItsPrecisionWhereScoresAreLarge) {
  Problem<float> problem(1, 600, 2, 1, 64, 64);
  for (float& x : problem.q) x *= 100;  // scores of several hundred: most weights vanish
  attend_step(problem.p, problem.o.data());
  std::vector<double> expected(problem.o.size());
  attend_step_naive(problem.p, expected.data());
  testing::expect_close(problem.o, expected, 1e-3, "large scores");
}

TEST(AttendStep, GivesTheSameBitsForAnyNumberOfThreads) {
  testing::expect_same_bits_for_any_threads([] {
    Problem<float> problem(2, 1000, 4, 2, 64, 48);
    attend_step(problem.p, problem.o.data());
    return problem.o;
  });
}

TEST(AttendStep, HandsNaNOn) {
  Problem<float> problem(1, 300, 2, 2, 16, 16);
  problem.k[5] = std::numeric_limits<float>::quiet_NaN();  // a key of the first head
  attend_step(problem.p, problem.o.data());
  for (int64_t i = 0; i < 16; ++i) EXPECT_TRUE(std::isnan(problem.o[i])) << i;
  for (int64_t i = 16; i < 32; ++i) EXPECT_FALSE(std::isnan(problem.o[i])) << i;
}

TEST(AttendStep, TokensOfNoWeightAddNothing) {
  // All tokens of a segment, those of two, and all but the last one score minus infinity.
  for (const auto& [first, end] : {std::pair<int64_t, int64_t>{0, 256}, {100, 600}, {0, 699}}) {
    Problem<float> problem(1, 700, 1, 1, 16, 16);
    std::fill(problem.q.begin(), problem.q.end(), 1.0f);
    for (int64_t s = first; s < end; ++s) {
      problem.k[s * problem.p.k_stride] = -std::numeric_limits<float>::infinity();
    }
    attend_step(problem.p, problem.o.data());
    std::vector<double> expected(problem.o.size());
    attend_step_naive(problem.p, expected.data());
    testing::expect_close(problem.o, expected, 1e-5, "minus infinity");
  }
}

TEST(AttendStep, TokensOfNoWeightHandNaNOn) {
  Problem<float> problem(1, 700, 1, 1, 16, 16);
  std::fill(problem.q.begin(), problem.q.end(), 1.0f);
  const auto hide = [&](int64_t tokens) {
    for (int64_t s = 0; s < tokens; ++s) {
      problem.k[s * problem.p.k_stride] = -std::numeric_limits<float>::infinity();
    }
    attend_step(problem.p, problem.o.data());
  };
  problem.v[3] = std::numeric_limits<float>::quiet_NaN();  // times a weight of zero
  hide(256);
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(std::isnan(problem.o[i]), i == 3) << i;
  hide(700);
  for (int64_t i = 0; i < 16; ++i) EXPECT_TRUE(std::isnan(problem.o[i])) << i;
}

TEST(AttendStep, RefusesWhatItCannotDo) {
  Problem<float> problem(1, 3, 4, 2, 8, 8);
  problem.p.HK = 3;
  EXPECT_THROW(attend_step(problem.p, problem.o.data()), Error);
  problem.p.HK = 2;
  problem.p.S = 0;
  EXPECT_THROW(attend_step(problem.p, problem.o.data()), Error);
}

}  // namespace
}  // namespace gdn
