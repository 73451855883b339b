// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/short_conv.h"

#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

struct Case {
  int width;
  int64_t channels;
  std::vector<int64_t> lengths;
  bool bias, silu, initial;
};

// Ragged and empty sequences, sequences shorter than the width, tiles that end inside and with a
// sequence; groups of 64 tokens that begin a token after a sequence and end a token before its end.
const Case kCases[] = {
    {4, 40, {70}, false, true, false},        {4, 33, {0, 3, 16, 33, 1}, true, true, true},
    {4, 300, {2, 50}, true, false, true},     {1, 17, {5, 0, 40}, true, true, true},
    {2, 16, {1, 35}, false, true, true},      {3, 19, {33, 2}, true, true, false},
    {8, 21, {4, 64, 0, 9}, true, true, true}, {4, 5, {32, 32}, false, true, true},
    {4, 530, {63, 66, 80}, true, true, true}};

template <typename T>
struct Data {
  Case c;
  std::vector<int64_t> cu;
  std::vector<T> x, initial, dy, d_final;
  std::vector<Acc<T>> weight, bias;

  explicit Data(const Case& c, uint64_t seed = 5) : c(c), cu{0} {
    for (int64_t length : c.lengths) cu.push_back(cu.back() + length);
    x = random_normal<T>(cu.back() * stride(), seed);
    dy = random_normal<T>(cu.back() * c.channels, seed + 1);
    initial = random_normal<T>(c.lengths.size() * c.channels * c.width, seed + 2);
    d_final = random_normal<T>(initial.size(), seed + 3);
    weight = random_normal<Acc<T>>(c.channels * c.width, seed + 4);
    bias = random_normal<Acc<T>>(c.channels, seed + 5);
  }
  int64_t stride() const { return c.channels + 3; }

  ShortConvParams params() const {
    ShortConvParams p;
    p.num_sequences = c.lengths.size();
    p.total_tokens = cu.back();
    p.cu_seqlens = cu.data();
    p.channels = c.channels;
    p.width = c.width;
    p.dtype = kDTypeOf<T>;
    p.silu = c.silu;
    p.x = x.data();
    p.x_stride = stride();
    p.weight = weight.data();
    p.bias = c.bias ? bias.data() : nullptr;
    p.initial = c.initial ? initial.data() : nullptr;
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<T> y, final_history, dx, d_initial;
  std::vector<Acc<T>> dweight, dbias;
  explicit Results(const Data<T>& d)
      : y(d.dy.size()),
        final_history(d.initial.size()),
        dx(y.size()),
        d_initial(d.initial.size()),
        dweight(d.weight.size()),
        dbias(d.bias.size()) {}
};

template <typename T>
Results<T> run(const Data<T>& data) {
  const ShortConvParams p = data.params();
  Results<T> r(data);
  short_conv_forward(p, r.y.data(), r.final_history.data());
  ShortConvGrads grads;
  grads.dy = data.dy.data();
  grads.d_final = data.d_final.data();
  grads.dx = r.dx.data();
  grads.dweight = r.dweight.data();
  grads.dbias = r.dbias.data();
  grads.d_initial = r.d_initial.data();
  short_conv_backward(p, grads);
  return r;
}

template <typename T>
Results<double> run_naive(const Data<T>& data) {
  const ShortConvParams p = data.params();
  Results<double> r{Data<double>(data.c)};
  short_conv_naive_forward(p, r.y.data(), r.final_history.data());
  short_conv_naive_backward(p, to_double(data.dy).data(), to_double(data.d_final).data(),
                            r.dx.data(), r.dweight.data(), r.dbias.data(), r.d_initial.data());
  return r;
}

template <typename T>
class ShortConvTest : public ::testing::Test {};
TYPED_TEST_SUITE(ShortConvTest, testing::StorageTypes);

TYPED_TEST(ShortConvTest, EqualsTheOracleOnEveryTarget) {
  using T = TypeParam;
  const double sum_tolerance = testing::acc_tolerance<T>(2e-5);
  testing::for_each_target([&](const std::string& target) {
    for (const Case& c : kCases) {
      const Data<T> data(c);
      const Results<T> fast = run(data);
      const Results<double> naive = run_naive(data);
      const std::string what =
          target + " W " + std::to_string(c.width) + " C " + std::to_string(c.channels);
      testing::expect_close(fast.y, naive.y, tolerance<T>(), what + " y");
      testing::expect_close(fast.final_history, naive.final_history, 0, what + " final");
      testing::expect_close(fast.dx, naive.dx, tolerance<T>(), what + " dx");
      testing::expect_close(fast.d_initial, naive.d_initial, tolerance<T>(), what + " d_initial");
      testing::expect_close(fast.dweight, naive.dweight, sum_tolerance, what + " dweight");
      testing::expect_close(fast.dbias, naive.dbias, sum_tolerance, what + " dbias");
    }
  });
}

TYPED_TEST(ShortConvTest, StepsGiveTheBitsOfTheWholeSequenceAndOfAnySplit) {
  using T = TypeParam;
  testing::for_each_target([](const std::string& target) {
    for (const int width : {4, 3, 1, 8}) {
      const int64_t channels = 37, length = 21, split = 9;
      const Data<T> data(Case{width, channels, {length}, true, true, true});
      const Results<T> whole = run(data);
      const ShortConvParams p = data.params();
      // A prefill of `split` tokens from the initial history into slot 2 of a pool, then one token
      // at a time.
      std::vector<T> pool(3 * channels * width), y(whole.y.size());
      const std::vector<T> untouched = pool;
      ShortConvParams prefill = p;
      const int64_t cu[] = {0, split};
      prefill.cu_seqlens = cu;
      prefill.total_tokens = split;
      T* state = pool.data() + 2 * channels * width;
      short_conv_forward(prefill, y.data(), state);
      for (int64_t t = split; t < length; ++t) {
        std::vector<T> x(2 * channels), out(2 * channels);
        std::copy_n(data.x.begin() + t * data.stride(), channels, x.begin() + channels);
        ShortConvParams step = p;
        step.num_sequences = 2;
        step.x = x.data();
        step.x_stride = 0;
        const int64_t slots[] = {-1, 2};
        std::fill(out.begin(), out.end(), data.x[0]);
        short_conv_step(step, pool.data(), 3, slots, out.data());
        EXPECT_TRUE(
            std::all_of(out.begin(), out.begin() + channels, [](T v) { return load(&v) == 0; }));
        std::copy_n(out.begin() + channels, channels, y.begin() + t * channels);
      }
      EXPECT_TRUE(testing::same_bits(y, whole.y)) << target << " W " << width;
      EXPECT_TRUE(
          testing::same_bits(std::vector<T>(state, state + channels * width), whole.final_history));
      EXPECT_TRUE(std::equal(pool.begin(), pool.begin() + 2 * channels * width, untouched.begin(),
                             [](T a, T b) { return load(&a) == load(&b); }));
    }
  });
}

TEST(ShortConv, OracleGradientsAgreeWithFiniteDifferences) {
  Data<double> data(Case{3, 2, {4, 1, 0, 2}, true, true, true});
  const Results<double> naive = run_naive(data);
  const auto loss = [&] {
    Results<double> r(data);
    short_conv_naive_forward(data.params(), r.y.data(), r.final_history.data());
    return dot(r.y, data.dy) + dot(r.final_history, data.d_final);
  };
  std::vector<double> dx(data.x.size());
  for (int64_t t = 0; t < data.cu.back(); ++t)
    std::copy_n(&naive.dx[t * 2], 2, &dx[t * data.stride()]);
  testing::expect_gradient(data.x, dx, loss, "dx");
  testing::expect_gradient(data.weight, naive.dweight, loss, "dweight");
  testing::expect_gradient(data.bias, naive.dbias, loss, "dbias");
  testing::expect_gradient(data.initial, naive.d_initial, loss, "d_initial");
}

TEST(ShortConv, MissingGradientsAreZerosAndEqualLengthsNeedNoCuSeqlens) {
  Data<float> data(Case{4, 24, {10, 10}, true, true, true});
  const Results<float> packed = run(data);
  ShortConvParams p = data.params();
  p.cu_seqlens = nullptr;
  Results<float> r(data);
  short_conv_forward(p, r.y.data(), r.final_history.data());
  EXPECT_TRUE(testing::same_bits(r.y, packed.y));
  ShortConvGrads grads;
  grads.d_final = data.d_final.data();
  grads.dx = r.dx.data();
  grads.dweight = r.dweight.data();
  short_conv_backward(p, grads);  // only the history's gradient: dx is that of the last W tokens
  EXPECT_EQ(r.dweight, std::vector<float>(r.dweight.size()));
  EXPECT_EQ(r.dx[6 * 24 + 1], data.d_final[4]);
  EXPECT_EQ(r.dx[5 * 24 + 1], 0.0f);
}

TEST(ShortConv, SameBitsForAnyNumberOfThreads) {
  const Data<float> data(Case{4, 600, {400, 3, 900}, true, true, true});
  testing::expect_same_bits_for_any_threads([&] { return run(data).dweight; });
  testing::expect_same_bits_for_any_threads([&] { return run(data).dx; });
  testing::expect_same_bits_for_any_threads([&] { return run(data).y; });
}

TEST(ShortConv, RejectsSizes) {
  Data<float> data(Case{4, 8, {6}, false, true, false});
  std::vector<float> y(48), pool(32);
  auto error = [&](auto change, auto call) {
    ShortConvParams p = data.params();
    change(p);
    EXPECT_THROW(call(p), Error);
  };
  auto forward = [&](const ShortConvParams& p) { short_conv_forward(p, y.data(), nullptr); };
  error([](auto& p) { p.width = 9; }, forward);
  error([](auto& p) { p.width = 0; }, forward);
  error([](auto& p) { p.x_stride = 7; }, forward);
  error([](auto& p) { p.cu_seqlens = nullptr, p.num_sequences = 4; }, forward);
  const int64_t slot = 1;
  error([](auto&) {},
        [&](const ShortConvParams& p) { short_conv_step(p, pool.data(), 1, &slot, y.data()); });
}

}  // namespace
}  // namespace gdn
