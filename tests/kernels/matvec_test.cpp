// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/matvec.h"

#include <utility>

#include "tests/kernels/support.h"

namespace gdn {
namespace {

template <typename T>
struct Problem {
  int64_t rows, in, stride;
  std::vector<int64_t> outs;
  bool bias;
  std::vector<T> x;
  std::vector<std::vector<T>> weight, biases, y;
  std::vector<MatvecWeight> weights;

  Problem(int64_t rows, int64_t in, std::vector<int64_t> outs, bool bias)
      : rows(rows),
        in(in),
        stride(in + 3),
        outs(std::move(outs)),
        bias(bias),
        x(testing::random_normal<T>(rows * stride, 1)) {
    for (const int64_t out : this->outs) {
      weight.push_back(testing::random_normal<T>(out * in, 2 + out));
      biases.push_back(testing::random_normal<T>(out, 3 + out));
      y.emplace_back(rows * out);
      weights.push_back(
          {weight.back().data(), bias ? biases.back().data() : nullptr, out, y.back().data(), out});
    }
  }
  MatvecParams params() const {
    MatvecParams p;
    p.rows = rows;
    p.in = in;
    p.dtype = kDTypeOf<T>;
    p.x = x.data();
    p.x_stride = stride;
    p.weights = weights;
    return p;
  }
};

template <typename T>
class MatvecTest : public ::testing::Test {};
using Dtypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(MatvecTest, Dtypes);

TYPED_TEST(MatvecTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([&](const std::string& target) {
    for (const int64_t in : {1, 2, 31, 64, 100, 255, 256}) {
      for (const int64_t rows : {1, 3}) {
        Problem<T> problem(rows, in, {5, 1, 16, 7}, in % 2 == 0);
        matvec(problem.params());
        std::vector<std::vector<double>> expected;
        std::vector<double*> places;
        for (const int64_t out : problem.outs) expected.emplace_back(rows * out);
        for (auto& e : expected) places.push_back(e.data());
        matvec_naive(problem.params(), places);
        for (size_t i = 0; i < problem.outs.size(); ++i) {
          testing::expect_close(problem.y[i], expected[i], testing::tolerance<T>(),
                                str_cat(target, " in ", in, " rows ", rows, " weight ", i));
        }
      }
    }
  });
}

TEST(Matvec, GivesTheSameBitsForAnyNumberOfThreadsAndRows) {
  testing::expect_same_bits_for_any_threads([] {
    Problem<float> problem(2, 512, {300, 64, 33}, true);
    matvec(problem.params());
    std::vector<float> all;
    for (const auto& y : problem.y) all.insert(all.end(), y.begin(), y.end());
    return all;
  });
  Problem<float> both(2, 100, {9}, false), one(1, 100, {9}, false);
  matvec(both.params());
  one.weights[0].weight = both.weight[0].data();
  one.x.assign(both.x.begin(), both.x.begin() + both.stride);
  matvec(one.params());
  both.y[0].resize(9);
  EXPECT_TRUE(testing::same_bits(both.y[0], one.y[0]));
}

TEST(Matvec, RefusesOtherTypes) {
  Problem<float> problem(1, 8, {4}, false);
  MatvecParams p = problem.params();
  p.dtype = DType::kF64;
  EXPECT_THROW(matvec(p), Error);
}

}  // namespace
}  // namespace gdn
