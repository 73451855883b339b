// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/swiglu.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

// gate and up are the two halves of one wider tensor.
template <typename T>
SwigluParams halves_of(const std::vector<T>& wide, int64_t rows, int64_t dim) {
  SwigluParams p;
  p.rows = rows;
  p.dim = dim;
  p.dtype = kDTypeOf<T>;
  p.gate = wide.data();
  p.up = wide.data() + dim;
  p.gate_layout = p.up_layout = {1, 2 * dim};
  return p;
}

template <typename T>
class SwigluTest : public ::testing::Test {};
TYPED_TEST_SUITE(SwigluTest, testing::StorageTypes);

TYPED_TEST(SwigluTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([](const std::string& target) {
    for (const auto& [rows, dim] : {std::pair{1, 1}, {5, 33}, {30, 700}}) {
      const int64_t n = rows * dim;
      const std::vector<T> wide = random_normal<T>(2 * n, 1, 2.0), dy = random_normal<T>(n, 2);
      const SwigluParams p = halves_of(wide, rows, dim);
      std::vector<T> y(n), dgate(n), dup(n);
      std::vector<double> y_naive(n), dgate_naive(n), dup_naive(n);
      swiglu_forward(p, y.data());
      swiglu_backward(p, dy.data(), dgate.data(), dup.data());
      swiglu_naive_forward(p, y_naive.data());
      swiglu_naive_backward(p, to_double(dy).data(), dgate_naive.data(), dup_naive.data());
      testing::expect_close(y, y_naive, tolerance<T>(), target + " y");
      testing::expect_close(dgate, dgate_naive, tolerance<T>(), target + " dgate");
      testing::expect_close(dup, dup_naive, tolerance<T>(), target + " dup");
    }
  });
}

// Kernels take SiLU and its parts to 2^-12 of themselves beside bf16, and then round, which adds
// half of a unit in the last place.
TEST(Swiglu, EachNumberOfBf16IsRoundedToANeighbour) {
  std::vector<BFloat16> gates;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BFloat16 z = {static_cast<uint16_t>(bits)};
    const double size = std::abs(static_cast<double>(load(&z)));
    if (size > 1e-30 && size < 80) gates.push_back(z);
  }
  const auto n = static_cast<int64_t>(gates.size());
  ASSERT_GT(n, 20000);
  std::vector<BFloat16> wide = gates;
  const std::vector<BFloat16> ones(gates.size(), to_bf16(1.0f));
  wide.insert(wide.end(), ones.begin(), ones.end());
  const auto half_unit = [](double x) { return std::exp2(std::floor(std::log2(std::abs(x))) - 8); };
  testing::for_each_target([&](const std::string& target) {
    std::vector<BFloat16> y(gates.size()), dgate = y, dup = y;
    swiglu_forward(halves_of(wide, 1, n), y.data());
    swiglu_backward(halves_of(wide, 1, n), ones.data(), dgate.data(), dup.data());
    for (size_t i = 0; i < gates.size(); ++i) {
      const double z = load(&gates[i]), s = 1 / (1 + std::exp(-z)), rest = 1 / (1 + std::exp(z));
      const double value = z * s, slope = s + value * rest;
      const double terms = s + std::abs(value * rest);
      ASSERT_LE(std::abs(load(&y[i]) - value), half_unit(value) + 0x1p-12 * std::abs(value))
          << target << " y of " << z;
      ASSERT_LE(std::abs(load(&dgate[i]) - slope), half_unit(slope) + 0x1p-12 * terms)
          << target << " dgate of " << z;
      EXPECT_EQ(dup[i].bits, y[i].bits) << target << " dup of " << z;
    }
  });
}

TEST(Swiglu, OracleGradientsAgreeWithFiniteDifferences) {
  const int64_t rows = 3, dim = 4, n = rows * dim;
  std::vector<double> wide = random_normal<double>(2 * n, 1);
  const std::vector<double> dy = random_normal<double>(n, 2);
  std::vector<double> dgate(n), dup(n), gradient(2 * n);
  swiglu_naive_backward(halves_of(wide, rows, dim), dy.data(), dgate.data(), dup.data());
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(&dgate[row * dim], dim, &gradient[row * 2 * dim]);
    std::copy_n(&dup[row * dim], dim, &gradient[row * 2 * dim + dim]);
  }
  const auto loss = [&] {
    std::vector<double> y(n);
    swiglu_naive_forward(halves_of(wide, rows, dim), y.data());
    return dot(y, dy);
  };
  testing::expect_gradient(wide, gradient, loss, "both");
}

TEST(Swiglu, ExtremesStayFiniteAndSizesAreChecked) {
  const std::vector<float> wide = {-1e30f, 1e4f, -200, 90, 1, 1, 1, 1};
  std::vector<float> y(4), dgate(4), dup(4), dy(4, 1.0f);
  const SwigluParams p = halves_of(wide, 1, 4);
  swiglu_forward(p, y.data());
  swiglu_backward(p, dy.data(), dgate.data(), dup.data());
  EXPECT_EQ(y, (std::vector<float>{-0.0f, 1e4f, -0.0f, 90}));
  EXPECT_EQ(dgate, (std::vector<float>{0, 1, 0, 1}));
  EXPECT_THROW(swiglu_forward(SwigluParams{}, y.data()), Error);
}

TEST(Swiglu, SigmoidsKeepTheirRelativePrecisionOnEveryTarget) {
  constexpr int64_t kDim = 4001;
  std::vector<float> wide(2 * kDim, 1.0f), y(kDim);
  for (int64_t i = 0; i < kDim; ++i) wide[i] = 0.04f * static_cast<float>(i - kDim / 2);
  testing::for_each_target([&](const std::string& target) {
    swiglu_forward(halves_of(wide, 1, kDim), y.data());
    for (int64_t i = 0; i < kDim; ++i) {
      const double z = wide[i], expected = z / (1 + std::exp(-z));
      ASSERT_NEAR(y[i], expected, 3e-6 * std::abs(expected)) << target << " at " << z;
    }
    // Whatever bits a NaN has, and in a whole vector as in the rest of a row.
    std::vector<float> nans(2 * kDim, 1.0f);
    std::fill_n(nans.begin(), kDim, std::bit_cast<float>(0x7f80ffffu));
    swiglu_forward(halves_of(nans, 1, kDim), y.data());
    for (const float v : y) ASSERT_TRUE(std::isnan(v)) << target;
  });
}

}  // namespace
}  // namespace gdn
