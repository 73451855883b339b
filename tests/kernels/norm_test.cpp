// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/norm.h"

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

struct Case {
  NormKind kind;
  bool weight;
  bool gate;
  NormGate activation;
  std::string name;
};

const Case kCases[] = {{NormKind::kL2, false, false, NormGate::kSilu, "l2"},
                       {NormKind::kRms, false, false, NormGate::kSilu, "rms without weight"},
                       {NormKind::kRms, true, false, NormGate::kSilu, "rms"},
                       {NormKind::kRms, true, true, NormGate::kSilu, "silu-gated rms"},
                       {NormKind::kRms, true, true, NormGate::kSigmoid, "sigmoid-gated rms"}};

// Data of one call; x and gate are heads inside wider tokens, so rows come in groups.
template <typename T>
struct Data {
  static constexpr int64_t kHeads = 3, kGap = 5;
  int64_t tokens, dim;
  std::vector<T> x, gate, dy;
  std::vector<Acc<T>> weight;

  Data(int64_t tokens, int64_t dim, uint64_t seed)
      : tokens(tokens),
        dim(dim),
        x(random_normal<T>(tokens * (kHeads * dim + kGap), seed)),
        gate(random_normal<T>(tokens * (kHeads * dim + kGap), seed + 1, 2.0)),
        dy(random_normal<T>(tokens * kHeads * dim, seed + 2)),
        weight(random_normal<Acc<T>>(dim, seed + 3, 0.3, 1.0)) {}

  NormParams params(const Case& c) const {
    NormParams p;
    p.kind = c.kind;
    p.rows = tokens * kHeads;
    p.dim = dim;
    p.dtype = kDTypeOf<T>;
    p.eps = 1e-2;
    p.x = x.data();
    p.x_layout = {kHeads, kHeads * dim + kGap};
    p.weight = c.weight ? weight.data() : nullptr;
    p.gate = c.gate ? gate.data() : nullptr;
    p.gate_layout = p.x_layout;
    p.activation = c.activation;
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<T> y, dx, dgate;
  std::vector<Acc<T>> dweight;
};

template <typename T>
Results<T> run(const NormParams& p, const std::vector<T>& dy) {
  const int64_t n = p.rows * p.dim;
  Results<T> r{std::vector<T>(n), std::vector<T>(n), std::vector<T>(n), std::vector<Acc<T>>(p.dim)};
  norm_forward(p, r.y.data());
  norm_backward(p, {dy.data(), {}, r.dx.data(), r.dgate.data(), r.dweight.data()});
  return r;
}

Results<double> run_naive(const NormParams& p, const std::vector<double>& dy) {
  const int64_t n = p.rows * p.dim;
  Results<double> r{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n),
                    std::vector<double>(p.dim)};
  norm_naive_forward(p, r.y.data());
  norm_naive_backward(p, dy.data(), r.dx.data(), r.dgate.data(), r.dweight.data());
  return r;
}

template <typename T>
class NormTest : public ::testing::Test {};
TYPED_TEST_SUITE(NormTest, testing::StorageTypes);

TYPED_TEST(NormTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([](const std::string& target) {
    for (const Case& c : kCases) {
      for (const auto& [tokens, dim] :
           {std::pair{1, 1},
            {5, 7},
            {11, 60},
            {4, 64},
            {4, 128},
            {3, 83},  // two bundles of 32, a vector and single elements; rows that are left of four
            {90, 200},
            {3, 700}}) {  // long rows in pairs, and one that is left
        const Data<T> data(tokens, dim, 7);
        const NormParams p = data.params(c);
        const Results<T> fast = run(p, data.dy);
        const Results<double> naive = run_naive(p, to_double(data.dy));
        const std::string what = target + " " + c.name + " dim " + std::to_string(dim);
        testing::expect_close(fast.y, naive.y, tolerance<T>(), what + " y");
        testing::expect_close(fast.dx, naive.dx, tolerance<T>(), what + " dx");
        if (c.gate) testing::expect_close(fast.dgate, naive.dgate, tolerance<T>(), what + " dgate");
        testing::expect_close(fast.dweight, naive.dweight, std::is_same_v<T, double> ? 1e-12 : 1e-5,
                              what + " dweight");
      }
    }
  });
}

TEST(Norm, OracleGradientsAgreeWithFiniteDifferences) {
  for (const Case& c : kCases) {
    Data<double> data(2, 5, 3);
    const NormParams p = data.params(c);
    const auto loss = [&] {
      std::vector<double> y(p.rows * p.dim);
      norm_naive_forward(p, y.data());
      return dot(y, data.dy);
    };
    const Results<double> naive = run_naive(p, data.dy);
    auto scatter =
        [&](const std::vector<double>& dense) {  // the gradient in the layout of x and gate
          std::vector<double> out(data.x.size());
          for (int64_t row = 0; row < p.rows; ++row) {
            std::copy_n(&dense[row * p.dim], p.dim, &out[p.x_layout.offset(row, p.dim)]);
          }
          return out;
        };
    testing::expect_gradient(data.x, scatter(naive.dx), loss, c.name + " dx");
    if (c.weight) {
      testing::expect_gradient(data.weight, naive.dweight, loss, c.name + " dweight");
    }
    if (c.gate) testing::expect_gradient(data.gate, scatter(naive.dgate), loss, c.name + " dgate");
  }
}

TEST(Norm, SameBitsForAnyNumberOfThreads) {
  const Data<float> data(700, 33, 1);
  const NormParams p = data.params(kCases[3]);
  testing::expect_same_bits_for_any_threads([&] { return run(p, data.dy).dweight; });
  testing::expect_same_bits_for_any_threads([&] { return run(p, data.dy).y; });
}

TEST(Norm, ZeroRowsAreFiniteAndNaNsAreHandedOn) {
  std::vector<float> x(32), y(32), dy(32, 1.0f), dx(32);
  NormParams p;
  p.kind = NormKind::kL2;
  p.rows = 2;
  p.dim = 16;
  p.eps = 1e-6;
  p.x = x.data();
  x[16] = NAN;
  norm_forward(p, y.data());
  norm_backward(p, {dy.data(), {}, dx.data(), nullptr, nullptr});
  for (int i = 0; i < 16; ++i) EXPECT_EQ(y[i], 0.0f);
  for (int i = 0; i < 16; ++i) EXPECT_FLOAT_EQ(dx[i], 1000.0f);  // 1 / sqrt(eps)
  for (int i = 16; i < 32; ++i) EXPECT_TRUE(std::isnan(y[i]));
}

TEST(Norm, RejectsSizesAndEps) {
  NormParams p;
  p.dim = 0;
  EXPECT_THROW(norm_forward(p, nullptr), Error);
  p.dim = 4;
  p.eps = -1;
  EXPECT_THROW(norm_forward(p, nullptr), Error);
  p.eps = 0;
  EXPECT_NO_THROW(norm_forward(p, nullptr));  // no rows
}

TYPED_TEST(NormTest, AddsResidualsForwardAndBackward) {
  using T = TypeParam;
  constexpr int64_t kRows = 6, kDim = 37, kStride = 40;
  constexpr double kScale = 0.5;
  const std::vector<T> x = random_normal<T>(kRows * kDim, 1),
                       dy = random_normal<T>(kRows * kDim, 2),
                       add = random_normal<T>(kRows * kStride, 3),
                       dsum = random_normal<T>(kRows * kStride, 4);
  testing::for_each_target([&](const std::string& target) {
    NormParams p;
    p.kind = NormKind::kRms;
    p.rows = kRows;
    p.dim = kDim;
    p.dtype = kDTypeOf<T>;
    p.eps = 1e-5;
    p.x = x.data();
    p.add = add.data();
    p.add_layout = {1, kStride};
    p.add_scale = kScale;
    std::vector<T> y(x.size()), sum(x.size()), again(x.size()), dx(x.size());
    norm_forward(p, y.data(), sum.data());
    std::vector<double> expected(x.size());
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t i = 0; i < kDim; ++i) {
        expected[row * kDim + i] =
            load(&x[row * kDim + i]) + kScale * load(&add[row * kStride + i]);
      }
    }
    testing::expect_close(sum, expected, tolerance<T>(), target + " sum");
    p.add = nullptr;
    p.x = sum.data();
    norm_forward(p, again.data());
    EXPECT_TRUE(testing::same_bits(y, again)) << target;

    NormGrads grads;
    grads.dy = dy.data();
    grads.dx = dx.data();
    grads.dsum = dsum.data();
    grads.dsum_layout = {1, kStride};
    norm_backward(p, grads);
    std::vector<double> naive(x.size());
    norm_naive_backward(p, to_double(dy).data(), naive.data(), nullptr, nullptr);
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t i = 0; i < kDim; ++i) naive[row * kDim + i] += load(&dsum[row * kStride + i]);
    }
    testing::expect_close(dx, naive, tolerance<T>(), target + " dx");
    EXPECT_THROW(norm_forward(p, y.data(), sum.data()), Error);
  });
}

}  // namespace
}  // namespace gdn
