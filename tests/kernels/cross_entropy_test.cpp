// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/cross_entropy.h"

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

template <typename T>
struct Data {
  int64_t rows, vocab;
  std::vector<T> logits;
  std::vector<int64_t> targets;
  std::vector<Acc<T>> dloss;

  Data(int64_t rows, int64_t vocab)
      : rows(rows),
        vocab(vocab),
        logits(random_normal<T>(rows * (vocab + 3), 1, 3.0)),
        dloss(random_normal<Acc<T>>(rows, 2)) {
    Rng rng(3);
    for (int64_t row = 0; row < rows; ++row)
      targets.push_back(row % 4 == 1 ? -100 : rng.below(vocab));
  }

  CrossEntropyParams params() const {
    CrossEntropyParams p;
    p.rows = rows;
    p.vocab = vocab;
    p.dtype = kDTypeOf<T>;
    p.logits = logits.data();
    p.logits_layout = {1, vocab + 3};
    p.targets = targets.data();
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<Acc<T>> loss, logsumexp;
  std::vector<T> dlogits;
  Results(int64_t rows, int64_t vocab) : loss(rows), logsumexp(rows), dlogits(rows * vocab) {}
};

template <typename T>
Results<T> run(const Data<T>& data) {
  Results<T> r(data.rows, data.vocab);
  cross_entropy_forward(data.params(), r.loss.data(), r.logsumexp.data());
  cross_entropy_backward(data.params(), r.logsumexp.data(), data.dloss.data(), r.dlogits.data());
  return r;
}

template <typename T>
Results<double> run_naive(const Data<T>& data) {
  Results<double> r(data.rows, data.vocab);
  cross_entropy_naive_forward(data.params(), r.loss.data(), r.logsumexp.data());
  cross_entropy_naive_backward(data.params(), to_double(data.dloss).data(), r.dlogits.data());
  return r;
}

template <typename T>
class CrossEntropyTest : public ::testing::Test {};
TYPED_TEST_SUITE(CrossEntropyTest, testing::StorageTypes);

TYPED_TEST(CrossEntropyTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  const double acc_tolerance = testing::acc_tolerance<T>(2e-6);
  testing::for_each_target([&](const std::string& target) {
    for (const auto& [rows, vocab] : {std::pair{3, 1}, {6, 5}, {9, 100}, {4, 1031}, {3, 2600}}) {
      const Data<T> data(rows, vocab);
      const Results<T> fast = run(data);
      const Results<double> naive = run_naive(data);
      const std::string what = target + " vocab " + std::to_string(vocab);
      testing::expect_close(fast.loss, naive.loss, acc_tolerance, what + " loss");
      testing::expect_close(fast.logsumexp, naive.logsumexp, acc_tolerance, what + " logsumexp");
      // Small gradients of fp16 are subnormal: they have an absolute precision only.
      const double tol = std::is_same_v<T, Float16> ? 2e-3 : tolerance<T>();
      if (vocab > 1) testing::expect_close(fast.dlogits, naive.dlogits, tol, what + " dlogits");
    }
  });
}

TEST(CrossEntropy, OracleGradientAgreesWithFiniteDifferences) {
  Data<double> data(5, 4);
  const Results<double> naive = run_naive(data);
  std::vector<double> gradient(data.logits.size());
  for (int64_t row = 0; row < 5; ++row) std::copy_n(&naive.dlogits[row * 4], 4, &gradient[row * 7]);
  const auto loss = [&] {
    Results<double> r(5, 4);
    cross_entropy_naive_forward(data.params(), r.loss.data(), r.logsumexp.data());
    return dot(r.loss, data.dloss);
  };
  testing::expect_gradient(data.logits, gradient, loss, "dlogits");
}

TEST(CrossEntropy, TheGradientMayOverwriteTheLogits) {
  Data<float> data(7, 37);
  CrossEntropyParams p = data.params();
  p.logits_layout = {};
  Results<float> apart(7, 37);
  cross_entropy_forward(p, apart.loss.data(), apart.logsumexp.data());
  cross_entropy_backward(p, apart.logsumexp.data(), data.dloss.data(), apart.dlogits.data());
  cross_entropy_backward(p, apart.logsumexp.data(), data.dloss.data(), data.logits.data());
  data.logits.resize(7 * 37);
  EXPECT_TRUE(testing::same_bits(data.logits, apart.dlogits));
}

TEST(CrossEntropy, HugeLogitsAreSafeAndNaNsAreHandedOn) {
  const float inf = INFINITY;
  const std::vector<float> logits = {3e38f, -3e38f, 0, 0, -inf, 1, 1, 1, NAN, 0, 0, 0};
  const std::vector<int64_t> targets = {0, 1, 1};
  CrossEntropyParams p;
  p.rows = 3;
  p.vocab = 4;
  p.logits = logits.data();
  p.targets = targets.data();
  std::vector<float> loss(3), lse(3), dlogits(12), dloss(3, 1.0f);
  cross_entropy_forward(p, loss.data(), lse.data());
  cross_entropy_backward(p, lse.data(), dloss.data(), dlogits.data());
  EXPECT_EQ(loss[0], 0);
  EXPECT_EQ(dlogits[0], 0);
  EXPECT_NEAR(loss[1], std::log(3.0), 1e-6);
  EXPECT_EQ(dlogits[4], 0);
  EXPECT_TRUE(std::isnan(loss[2]));
  EXPECT_TRUE(std::isnan(dlogits[9]));
}

TEST(CrossEntropy, TheLargestLogitMayStandInAnyBlock) {
  constexpr int64_t kVocab = 3000;
  testing::for_each_target([&](const std::string& target) {
    for (const int64_t where : {0, 1030, 2047, 2999}) {
      // Whole blocks of excluded entries, which must neither count nor turn the sum into NaN.
      std::vector<float> logits(kVocab, -INFINITY), dlogits(kVocab);
      logits[where] = 200;
      logits[1500] = 199;
      const int64_t word = 1500;
      CrossEntropyParams p;
      p.rows = 1;
      p.vocab = kVocab;
      p.logits = logits.data();
      p.targets = &word;
      float loss = 0, lse = 0;
      const float dloss = 1;
      cross_entropy_forward(p, &loss, &lse);
      cross_entropy_backward(p, &lse, &dloss, dlogits.data());
      EXPECT_NEAR(loss, std::log1p(std::exp(1.0)), 1e-6) << target << " " << where;
      EXPECT_NEAR(lse, 200 + std::log1p(std::exp(-1.0)), 2e-5) << target << " " << where;
      EXPECT_NEAR(dlogits[where], 1 / (1 + std::exp(-1.0)), 2e-5) << target << " " << where;
      EXPECT_EQ(dlogits[where == 0 ? 1 : 0], 0) << target << " " << where;
      logits[where] = NAN;
      cross_entropy_forward(p, &loss, &lse);
      EXPECT_TRUE(std::isnan(lse)) << target << " " << where;
    }
  });
}

TEST(CrossEntropy, SmallLossesOfLargeLogitsKeepTheirDigits) {
  const std::vector<float> logits = {10000, 9990};
  const int64_t target = 0;
  CrossEntropyParams p;
  p.rows = 1;
  p.vocab = 2;
  p.logits = logits.data();
  p.targets = &target;
  float loss, lse;
  cross_entropy_forward(p, &loss, &lse);
  EXPECT_NEAR(loss, std::log1p(std::exp(-10.0)), 2e-7);
}

TEST(CrossEntropy, SameBitsForAnyNumberOfThreads) {
  const Data<float> data(50, 4001);
  testing::expect_same_bits_for_any_threads([&] { return run(data).dlogits; });
  testing::expect_same_bits_for_any_threads([&] { return run(data).loss; });
}

TEST(CrossEntropy, RejectsTargetsOutOfRange) {
  Data<float> data(3, 5);
  std::vector<float> loss(3), lse(3);
  for (const int64_t bad : {int64_t{5}, int64_t{-1}}) {
    data.targets[2] = bad;
    EXPECT_THROW(cross_entropy_forward(data.params(), loss.data(), lse.data()), Error);
  }
  data.targets[2] = -1;
  CrossEntropyParams p = data.params();
  p.ignore_index = -1;
  EXPECT_THROW(cross_entropy_forward(p, loss.data(), lse.data()), Error);  // -100 is a class now
}

}  // namespace
}  // namespace gdn
