// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/gate.h"

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

struct Case {
  int64_t rows, heads, channels;
  bool dt_bias;
  std::optional<double> lower_bound;
  std::string name;
};

const Case kCases[] = {{37, 5, 1, true, {}, "gdn"},
                       {400, 16, 1, true, {}, "gdn, many rows"},
                       {9, 3, 20, true, {}, "kda"},
                       {9, 2, 7, false, {}, "kda without dt_bias"},
                       {11, 7, 17, true, {}, "kda, many vectors and a rest"},
                       {50, 2, 16, true, -5.0, "safe kda"},
                       {6, 3, 51, false, -2.0, "safe kda, many vectors and a rest"}};

template <typename T>
struct Data {
  Case c;
  int64_t dim;
  std::vector<T> a;
  std::vector<Acc<T>> A_log, dt_bias, dg;

  explicit Data(const Case& c)
      : c(c),
        dim(c.heads * c.channels),
        a(random_normal<T>(c.rows * (dim + 2), 1, 3.0)),
        A_log(random_normal<Acc<T>>(c.heads, 2)),
        dt_bias(random_normal<Acc<T>>(dim, 3)),
        dg(random_normal<Acc<T>>(c.rows * dim, 4)) {
    store(&a[1], Acc<T>{25});  // beyond softplus's threshold
    store(&a[2], Acc<T>{-60});
  }

  GateParams params() const {
    GateParams p;
    p.rows = c.rows;
    p.heads = c.heads;
    p.channels = c.channels;
    p.dtype = kDTypeOf<T>;
    p.a = a.data();
    p.a_layout = {1, dim + 2};
    p.A_log = A_log.data();
    p.dt_bias = c.dt_bias ? dt_bias.data() : nullptr;
    p.lower_bound = c.lower_bound;
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<Acc<T>> g, dA_log, ddt_bias;
  std::vector<T> da;
  explicit Results(const Data<T>& d)
      : g(d.dg.size()), dA_log(d.c.heads), ddt_bias(d.dim), da(d.dg.size()) {}
};

template <typename T>
Results<T> run(const Data<T>& data) {
  Results<T> r(data);
  gate_forward(data.params(), r.g.data());
  gate_backward(data.params(), {data.dg.data(), r.da.data(), r.dA_log.data(), r.ddt_bias.data()});
  return r;
}

template <typename T>
Results<double> run_naive(const Data<T>& data) {
  Results<double> r{Data<double>(data.c)};
  gate_naive_forward(data.params(), r.g.data());
  gate_naive_backward(data.params(), to_double(data.dg).data(), r.da.data(), r.dA_log.data(),
                      r.ddt_bias.data());
  return r;
}

template <typename T>
class GateTest : public ::testing::Test {};
TYPED_TEST_SUITE(GateTest, testing::StorageTypes);

TYPED_TEST(GateTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  testing::for_each_target([&](const std::string& target) {
    for (const Case& c : kCases) {
      const Data<T> data(c);
      const Results<T> fast = run(data);
      const Results<double> naive = run_naive(data);
      const std::string what = target + " " + c.name;
      testing::expect_close(fast.g, naive.g, testing::acc_tolerance<T>(), what + " g");
      testing::expect_close(fast.da, naive.da, tolerance<T>(), what + " da");
      testing::expect_close(fast.dA_log, naive.dA_log, testing::acc_tolerance<T>(),
                            what + " dA_log");
      testing::expect_close(fast.ddt_bias, naive.ddt_bias, testing::acc_tolerance<T>(),
                            what + " ddt_bias");
    }
  });
}

TYPED_TEST(GateTest, BetaEqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  const int64_t rows = 21, dim = 19;
  const std::vector<T> b = random_normal<T>(rows * (dim + 4), 1, 3.0);
  const std::vector<Acc<T>> dbeta = random_normal<Acc<T>>(rows * dim, 2);
  testing::for_each_target([&](const std::string& target) {
    for (const double scale : {1.0, 2.0}) {
      BetaParams p;
      p.rows = rows;
      p.dim = dim;
      p.dtype = kDTypeOf<T>;
      p.scale = scale;
      p.b = b.data();
      p.b_layout = {1, dim + 4};
      std::vector<Acc<T>> beta(rows * dim);
      std::vector<T> db(rows * dim);
      std::vector<double> beta_naive(rows * dim), db_naive(rows * dim);
      beta_forward(p, beta.data());
      beta_backward(p, dbeta.data(), db.data());
      beta_naive_forward(p, beta_naive.data());
      beta_naive_backward(p, to_double(dbeta).data(), db_naive.data());
      testing::expect_close(beta, beta_naive, testing::acc_tolerance<T>(), target + " beta");
      testing::expect_close(db, db_naive, tolerance<T>(), target + " db");
    }
  });
}

TEST(Gate, OracleGradientsAgreeWithFiniteDifferences) {
  for (Case c : kCases) {
    c.rows = 3;
    Data<double> data(c);
    const Results<double> naive = run_naive(data);
    const auto loss = [&] {
      std::vector<double> g(data.dg.size());
      gate_naive_forward(data.params(), g.data());
      return dot(g, data.dg);
    };
    std::vector<double> da(data.a.size());
    for (int64_t row = 0; row < c.rows; ++row) {
      std::copy_n(&naive.da[row * data.dim], data.dim, &da[row * (data.dim + 2)]);
    }
    testing::expect_gradient(data.a, da, loss, c.name + " da", 1e-6);
    testing::expect_gradient(data.A_log, naive.dA_log, loss, c.name + " dA_log", 1e-6);
    if (!c.dt_bias) continue;
    testing::expect_gradient(data.dt_bias, naive.ddt_bias, loss, c.name + " ddt_bias", 1e-6);
  }
  std::vector<double> b = random_normal<double>(6, 1);
  const std::vector<double> dbeta = random_normal<double>(6, 2);
  BetaParams p;
  p.rows = 2;
  p.dim = 3;
  p.dtype = DType::kF64;
  p.scale = 2;
  p.b = b.data();
  std::vector<double> db(6);
  beta_naive_backward(p, dbeta.data(), db.data());
  const auto loss = [&] {
    std::vector<double> beta(6);
    beta_naive_forward(p, beta.data());
    return dot(beta, dbeta);
  };
  testing::expect_gradient(b, db, loss, "db");
}

TEST(Gate, IsNeverPositiveAndExtremesStayFinite) {
  const std::vector<float> a = {-1e30f, -100, 0, 100, 1e4f}, A_log = {2.7f}, dg(5, 1.0f);
  GateParams p;
  p.rows = 5;
  p.heads = 1;
  p.a = a.data();
  p.A_log = A_log.data();
  std::vector<float> g(5), da(5), dA_log(1), ddt_bias(1);
  gate_forward(p, g.data());
  gate_backward(p, {dg.data(), da.data(), dA_log.data(), ddt_bias.data()});
  for (int i = 0; i < 5; ++i) {
    EXPECT_LE(g[i], 0) << i;
    EXPECT_TRUE(std::isfinite(g[i]) && std::isfinite(da[i])) << i;
  }
  EXPECT_EQ(g[0], 0);
  EXPECT_EQ(da[0], 0);
  EXPECT_FLOAT_EQ(g[4], -1e4f * std::exp(2.7f));
}

TEST(Gate, SoftplusAndItsSlopeKeepTheirRelativePrecisionOnEveryTarget) {
  constexpr int64_t kRows = 1, kChannels = 3001;
  std::vector<float> a(kChannels), g(kChannels), da(kChannels), dg(kChannels, 1.0f);
  for (int64_t i = 0; i < kChannels; ++i) a[i] = 0.05f * static_cast<float>(i - kChannels / 2);
  const float A_log = 0;
  float dA_log = 0;
  GateParams p;
  p.rows = kRows;
  p.heads = 1;
  p.channels = kChannels;
  p.a = a.data();
  p.A_log = &A_log;
  testing::for_each_target([&](const std::string& target) {
    gate_forward(p, g.data());
    gate_backward(p, {dg.data(), da.data(), &dA_log, nullptr});
    for (int64_t i = 0; i < kChannels; ++i) {
      const double soft = std::log1p(std::exp(static_cast<double>(a[i])));
      const double slope = 1 / (1 + std::exp(-static_cast<double>(a[i])));
      ASSERT_NEAR(g[i], -soft, 3e-6 * soft) << target << " at " << a[i];
      ASSERT_NEAR(da[i], -slope, 3e-6 * slope) << target << " at " << a[i];
    }
  });
}

TEST(Gate, SameBitsForAnyNumberOfThreads) {
  const Data<float> data(Case{3000, 6, 4, true, {}, "threads"});
  testing::expect_same_bits_for_any_threads([&] { return run(data).dA_log; });
  testing::expect_same_bits_for_any_threads([&] { return run(data).ddt_bias; });
}

TEST(Gate, RejectsSizesAndBounds) {
  GateParams p;
  EXPECT_THROW(gate_forward(p, nullptr), Error);
  p.heads = 2;
  p.lower_bound = 0.0;
  EXPECT_THROW(gate_forward(p, nullptr), Error);
  EXPECT_THROW(beta_forward(BetaParams{}, nullptr), Error);
}

}  // namespace
}  // namespace gdn
