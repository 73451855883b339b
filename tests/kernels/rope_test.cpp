// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/rope.h"

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::random_normal;
using testing::tolerance;

const std::vector<int64_t> kPositions = {0, 1, 2, 700, 131071, 1000003, -5};

template <typename T>
RopeParams params_of(const std::vector<T>& x, int64_t heads, int64_t dim, int64_t rotary_dim) {
  RopeParams p;
  p.tokens = kPositions.size();
  p.heads = heads;
  p.dim = dim;
  p.rotary_dim = rotary_dim;
  p.dtype = kDTypeOf<T>;
  p.x = x.data();
  p.x_layout = {heads, heads * dim + 5};
  p.positions = kPositions.data();
  return p;
}

template <typename T>
class RopeTest : public ::testing::Test {};
TYPED_TEST_SUITE(RopeTest, testing::StorageTypes);

TYPED_TEST(RopeTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([](const std::string& target) {
    for (const auto& [dim, rotary_dim] : {std::pair{64, 64}, {80, 20}, {6, 2}, {5, 0}, {256, 64}}) {
      const std::vector<T> x = random_normal<T>(kPositions.size() * (3 * dim + 5), 1);
      RopeParams p = params_of(x, 3, dim, rotary_dim);
      std::vector<T> y(kPositions.size() * 3 * dim);
      std::vector<double> naive(y.size());
      for (const bool inverse : {false, true}) {
        p.inverse = inverse;
        p.theta = inverse ? 1e6 : 1e4;
        rope(p, y.data());
        rope_naive(p, naive.data());
        // The double oracle's own angle at position 1e6 has an error of 1e-10.
        testing::expect_close(y, naive, std::is_same_v<T, double> ? 1e-9 : tolerance<T>(),
                              target + " rotary_dim " + std::to_string(rotary_dim));
      }
    }
  });
}

TEST(Rope, RotatesPairsByThePositionAndBack) {
  const std::vector<double> x = random_normal<double>(kPositions.size() * 13, 1);
  RopeParams p = params_of(x, 1, 8, 4);
  std::vector<double> y(kPositions.size() * 8), back(y.size());
  rope(p, y.data());
  const double angle = 2 * std::pow(10000.0, -0.5);  // token 2, the second pair: dimensions 1 and 3
  EXPECT_NEAR(y[2 * 8 + 1], x[2 * 13 + 1] * std::cos(angle) - x[2 * 13 + 3] * std::sin(angle),
              1e-14);
  EXPECT_NEAR(y[2 * 8 + 3], x[2 * 13 + 3] * std::cos(angle) + x[2 * 13 + 1] * std::sin(angle),
              1e-14);
  EXPECT_EQ(y[2 * 8 + 4], x[2 * 13 + 4]);
  EXPECT_NEAR(y[0], x[0], 1e-15);
  p.x = y.data();
  p.x_layout = {};
  p.inverse = true;
  rope(p, back.data());
  for (size_t t = 0; t < kPositions.size(); ++t) {
    for (int i = 0; i < 8; ++i) EXPECT_NEAR(back[t * 8 + i], x[t * 13 + i], 1e-13);
  }
}

TEST(Rope, SameBitsForAnyNumberOfThreads) {
  const std::vector<float> x = random_normal<float>(kPositions.size() * (64 * 128 + 5), 1);
  const RopeParams p = params_of(x, 64, 128, 128);
  testing::expect_same_bits_for_any_threads([&] {
    std::vector<float> y(kPositions.size() * 64 * 128);
    rope(p, y.data());
    return y;
  });
}

TEST(Rope, RejectsSizes) {
  const std::vector<float> x(kPositions.size() * 13);
  std::vector<float> y(x.size());
  for (const int64_t bad : {3, 10, -2})
    EXPECT_THROW(rope(params_of(x, 1, 8, bad), y.data()), Error) << bad;
  RopeParams p = params_of(x, 1, 8, 4);
  p.theta = 0;
  EXPECT_THROW(rope(p, y.data()), Error);
}

}  // namespace
}  // namespace gdn
