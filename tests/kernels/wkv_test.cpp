// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/rwkv4/kernel.h"
#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

struct Case {
  int64_t channels;
  std::vector<int64_t> lengths;
  bool initial;
  double spread = 1;  // of k
};

// Ragged and empty sequences, chunks that end inside and with a sequence, vectors and tiles that
// are not full, exponents far beyond what exp can hold.
const Case kCases[] = {{64, {70}, false},  {37, {0, 3, 64, 65, 1}, true}, {130, {2, 50}, true},
                       {16, {129}, false}, {5, {40, 40}, true, 300},      {19, {33}, false, 1000}};

template <typename T>
struct Data {
  Case c;
  std::vector<int64_t> cu;
  std::vector<T> k, v, dy;
  std::vector<Acc<T>> w, u, initial, d_final;

  explicit Data(const Case& c, uint64_t seed = 5) : c(c), cu{0} {
    for (int64_t length : c.lengths) cu.push_back(cu.back() + length);
    k = random_normal<T>(cu.back() * c.channels, seed, c.spread);
    v = random_normal<T>(k.size(), seed + 1);
    dy = random_normal<T>(k.size(), seed + 2);
    w = random_normal<Acc<T>>(c.channels, seed + 3, 0.3);
    for (Acc<T>& x : w) x = -std::abs(x);
    u = random_normal<Acc<T>>(c.channels, seed + 4);
    initial = random_normal<Acc<T>>(c.lengths.size() * 3 * c.channels, seed + 5);
    d_final = random_normal<Acc<T>>(initial.size(), seed + 6);
    for (size_t n = 0; n < c.lengths.size(); ++n)
      for (int64_t i = 0; i < c.channels; ++i) {
        Acc<T>& q = initial[(n * 3 + 1) * c.channels + i];
        q = 1 + std::abs(q);
      }
  }

  WkvParams params() const {
    WkvParams p;
    p.num_sequences = c.lengths.size();
    p.total_tokens = cu.back();
    p.cu_seqlens = cu.data();
    p.channels = c.channels;
    p.dtype = kDTypeOf<T>;
    p.w = w.data();
    p.u = u.data();
    p.k = k.data();
    p.v = v.data();
    p.initial = c.initial ? initial.data() : nullptr;
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<T> y, dk, dv;
  std::vector<Acc<T>> final_state, dw, du, d_initial;
  explicit Results(const Data<T>& d)
      : y(d.k.size()),
        dk(d.k.size()),
        dv(d.k.size()),
        final_state(d.initial.size()),
        dw(d.w.size()),
        du(d.w.size()),
        d_initial(d.initial.size()) {}
  WkvGrads grads(const void* dy, const void* d_final) {
    return {dy, d_final, dw.data(), du.data(), dk.data(), dv.data(), d_initial.data()};
  }
};

template <typename T>
Results<T> run(const Data<T>& data, bool with_dy = true, bool with_final = true) {
  const WkvParams p = data.params();
  Results<T> r(data);
  std::vector<Acc<T>> saved(wkv_chunks(p) * 3 * p.channels);
  wkv_forward(p, r.y.data(), r.final_state.data(), saved.data());
  wkv_backward(
      p, saved.data(),
      r.grads(with_dy ? data.dy.data() : nullptr, with_final ? data.d_final.data() : nullptr));
  return r;
}

template <typename T>
Results<double> run_naive(const Data<T>& data, bool with_dy = true, bool with_final = true) {
  Results<double> r{Data<double>(data.c)};
  const WkvParams p = data.params();
  wkv_naive_forward(p, r.y.data(), r.final_state.data());
  const std::vector<double> dy = to_double(data.dy), d_final = to_double(data.d_final);
  wkv_naive_backward(p,
                     r.grads(with_dy ? dy.data() : nullptr, with_final ? d_final.data() : nullptr));
  return r;
}

template <typename T>
class Wkv : public ::testing::Test {};
TYPED_TEST_SUITE(Wkv, testing::StorageTypes);

// The stable recurrence against the sums written out.
TYPED_TEST(Wkv, EqualsTheOracle) {
  using T = TypeParam;
  for (const Case& c : kCases) {
    const Data<T> data(c);
    const Results<double> want = run_naive(data);
    // Rounding an exponent of 1000 in fp32 costs 1000 times as much as one of 1.
    const double tol = 3 * tolerance<T>() +
                       (std::is_same_v<T, double> ? 1e-15 : 2e-7) * (c.spread > 1 ? c.spread : 0);
    testing::for_each_target([&](const std::string& target) {
      const Results<T> r = run(data);
      testing::expect_close(r.y, want.y, tol, target + " y");
      testing::expect_close(r.final_state, want.final_state, tol, target + " final_state");
      testing::expect_close(r.dk, want.dk, tol, target + " dk");
      testing::expect_close(r.dv, want.dv, tol, target + " dv");
      testing::expect_close(r.dw, want.dw, tol, target + " dw");
      testing::expect_close(r.du, want.du, tol, target + " du");
      if (c.initial) testing::expect_close(r.d_initial, want.d_initial, tol, target + " d_initial");
    });
  }
}

// The oracle itself against differences.
TEST(WkvOracle, GradientsEqualDifferences) {
  for (const Case& c : {Case{2, {5, 0, 3}, true}, Case{3, {6}, false}}) {
    Data<double> data(c);
    const Results<double> r = run_naive(data);
    const auto loss = [&] {
      Results<double> out(data);
      wkv_naive_forward(data.params(), out.y.data(), out.final_state.data());
      return dot(out.y, data.dy) + dot(out.final_state, data.d_final);
    };
    testing::expect_gradient(data.w, r.dw, loss, "w");
    testing::expect_gradient(data.u, r.du, loss, "u");
    testing::expect_gradient(data.k, r.dk, loss, "k");
    testing::expect_gradient(data.v, r.dv, loss, "v");
    if (c.initial) testing::expect_gradient(data.initial, r.d_initial, loss, "initial");
  }
}

TEST(WkvGradients, AbsentOnesAreZero) {
  const Data<double> data(kCases[1]);
  testing::expect_close(run(data, false, true).dk, run_naive(data, false, true).dk, 1e-12, "dk");
  testing::expect_close(run(data, true, false).dw, run_naive(data, true, false).dw, 1e-12, "dw");
}

// A state of zeros has seen nothing, even where every key is far below 0.
TEST(WkvState, ZerosAreAFreshStart) {
  Data<float> fresh({33, {12}, false, 200});
  Data<float> zeros = fresh;
  zeros.c.initial = true;
  std::fill(zeros.initial.begin(), zeros.initial.end(), 0.0f);
  EXPECT_TRUE(testing::same_bits(run(fresh).y, run(zeros).y));
  EXPECT_TRUE(testing::same_bits(run(fresh).final_state, run(zeros).final_state));
  EXPECT_TRUE(testing::same_bits(run(fresh).dk, run(zeros).dk));
}

TYPED_TEST(Wkv, StepsEqualTheForwardPass) {
  using T = TypeParam;
  const int64_t C = 37, length = 9;
  const Data<T> data({C, {length, length}, true});
  testing::for_each_target([&](const std::string& target) {
    const Results<T> want = run(data);
    // Sequence 0 lives in slot 2 and sequence 1 in slot 0 of three; slot 1 must stay as it is.
    const std::vector<int64_t> slots = {2, -1, 0};
    std::vector<Acc<T>> pool(9 * C, Acc<T>{7});
    std::copy_n(data.initial.begin(), 3 * C, pool.begin() + 6 * C);
    std::copy_n(data.initial.begin() + 3 * C, 3 * C, pool.begin());
    std::vector<T> y(data.k.size());
    for (int64_t t = 0; t < length; ++t) {
      const auto rows = [&](const std::vector<T>& from) {
        std::vector<T> out(3 * C);
        for (int64_t n : {0, 1})
          std::copy_n(from.begin() + (n * length + t) * C, C, out.begin() + 2 * n * C);
        return out;
      };
      const auto k = rows(data.k), v = rows(data.v);
      WkvParams p = data.params();
      p.num_sequences = p.total_tokens = 3;
      p.cu_seqlens = nullptr;
      p.k = k.data();
      p.v = v.data();
      std::vector<T> out(3 * C);
      store(&out[C], Acc<T>{5});
      wkv_step(p, pool.data(), 3, slots.data(), out.data());
      for (int64_t n : {0, 1})
        std::copy_n(out.begin() + 2 * n * C, C, y.begin() + (n * length + t) * C);
      for (int64_t c = 0; c < C; ++c) ASSERT_EQ(load(&out[C + c]), 0) << "no sequence";
    }
    EXPECT_TRUE(testing::same_bits(y, want.y)) << target;
    std::vector<Acc<T>> last(want.final_state.begin() + 3 * C, want.final_state.end());
    last.insert(last.end(), 3 * C, Acc<T>{7});
    last.insert(last.end(), want.final_state.begin(), want.final_state.begin() + 3 * C);
    EXPECT_TRUE(testing::same_bits(pool, last)) << target;
  });
}

TEST(WkvThreads, SameBits) {
  const Data<float> data({200, {40, 0, 70, 3}, true});
  testing::expect_same_bits_for_any_threads([&] {
    const Results<float> r = run(data);
    std::vector<float> all = r.y;
    for (const auto* part : {&r.dk, &r.dv, &r.dw, &r.du, &r.d_initial})
      all.insert(all.end(), part->begin(), part->end());
    return all;
  });
}

TEST(WkvInput, NanStaysNan) {
  Data<float> data({16, {4}, false});
  data.k[16] = std::nanf("");
  const Results<float> r = run(data);
  EXPECT_FALSE(std::isnan(r.y[0]));
  EXPECT_TRUE(std::isnan(r.y[16]));
  EXPECT_TRUE(std::isnan(r.y[48]));
}

TEST(WkvInput, Rejected) {
  WkvParams p;
  EXPECT_THROW(wkv_chunks(p), Error);
  p.channels = 2;
  p.num_sequences = 2;
  p.total_tokens = 3;
  EXPECT_THROW(wkv_chunks(p), Error);
  const int64_t slots[] = {0, 3};
  EXPECT_THROW(wkv_step(p, nullptr, 3, slots, nullptr), Error);
}

}  // namespace
}  // namespace gdn
