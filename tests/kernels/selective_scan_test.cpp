// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mamba/kernel.h"
#include "tests/kernels/support.h"

namespace gdn {
namespace {

using testing::dot;
using testing::random_normal;
using testing::to_double;
using testing::tolerance;

struct Case {
  int64_t channels, states;
  std::vector<int64_t> lengths;
  bool softplus, is_signed, extras;  // extras: D, dt_bias and an initial state
};

// Ragged and empty sequences, chunks that end inside and with a sequence, tiles and vectors that
// are not full.
const Case kCases[] = {
    {64, 16, {70}, true, false, true},    {37, 16, {0, 3, 32, 33, 1}, true, false, true},
    {130, 5, {2, 50}, true, true, true},  {16, 1, {65, 0, 20}, false, false, false},
    {5, 33, {64, 64}, false, true, true}, {71, 4, {31}, true, true, false}};

template <typename T>
struct Data {
  Case c;
  std::vector<int64_t> cu;
  std::vector<T> x, dt, B, C, dy;
  std::vector<Acc<T>> A, D, dt_bias, initial, d_final;

  explicit Data(const Case& c, uint64_t seed = 5) : c(c), cu{0} {
    for (int64_t length : c.lengths) cu.push_back(cu.back() + length);
    const int64_t T_total = cu.back();
    x = random_normal<T>(T_total * c.channels, seed);
    dt = random_normal<T>(x.size(), seed + 1, 0.5, c.softplus ? -1.0 : 0.0);
    if (!c.softplus)  // step sizes themselves: positive
      for (T& v : dt) store(&v, std::abs(load(&v)));
    B = random_normal<T>(T_total * c.states, seed + 2);
    C = random_normal<T>(B.size(), seed + 3);
    dy = random_normal<T>(x.size(), seed + 4);
    A = random_normal<Acc<T>>(c.channels * c.states, seed + 5);
    for (Acc<T>& v : A) v = -std::abs(v);
    D = random_normal<Acc<T>>(c.channels, seed + 6);
    dt_bias = random_normal<Acc<T>>(c.channels, seed + 7);
    if (!c.softplus)
      for (Acc<T>& v : dt_bias) v = std::abs(v);
    initial = random_normal<Acc<T>>(c.lengths.size() * A.size(), seed + 8);
    d_final = random_normal<Acc<T>>(initial.size(), seed + 9);
  }

  SelectiveScanParams params() const {
    SelectiveScanParams p;
    p.num_sequences = c.lengths.size();
    p.total_tokens = cu.back();
    p.cu_seqlens = cu.data();
    p.channels = c.channels;
    p.states = c.states;
    p.dtype = kDTypeOf<T>;
    p.softplus = c.softplus;
    p.signed_transition = c.is_signed;
    p.x = x.data();
    p.dt = dt.data();
    p.A = A.data();
    p.B = B.data();
    p.C = C.data();
    if (c.extras) {
      p.D = D.data();
      p.dt_bias = dt_bias.data();
      p.initial = initial.data();
    }
    return p;
  }
};

template <typename T>
struct Results {
  std::vector<T> y, dx, ddt, dB, dC;
  std::vector<Acc<T>> final_state, dA, dD, ddt_bias, d_initial;

  explicit Results(const Data<T>& d)
      : y(d.x.size()),
        dx(d.x.size()),
        ddt(d.x.size()),
        dB(d.B.size()),
        dC(d.B.size()),
        final_state(d.initial.size()),
        dA(d.A.size()),
        dD(d.D.size()),
        ddt_bias(d.D.size()),
        d_initial(d.initial.size()) {}

  SelectiveScanGrads grads(const void* dy, const void* d_final) {
    return {dy,        d_final,   dx.data(), ddt.data(),      dA.data(),
            dB.data(), dC.data(), dD.data(), ddt_bias.data(), d_initial.data()};
  }
};

template <typename T>
Results<T> run(const Data<T>& data, bool with_dy = true, bool with_final = true) {
  const SelectiveScanParams p = data.params();
  Results<T> r(data);
  std::vector<Acc<T>> saved(selective_scan_chunks(p) * p.states * p.channels);
  selective_scan_forward(p, r.y.data(), r.final_state.data(), saved.data());
  selective_scan_backward(
      p, saved.data(),
      r.grads(with_dy ? data.dy.data() : nullptr, with_final ? data.d_final.data() : nullptr));
  return r;
}

// The oracle on the same values, its results in double.
template <typename T>
Results<double> run_naive(const Data<T>& data) {
  Data<double> shape(data.c);
  Results<double> r(shape);
  const SelectiveScanParams p = data.params();
  selective_scan_naive_forward(p, r.y.data(), r.final_state.data());
  const std::vector<double> dy = to_double(data.dy), d_final = to_double(data.d_final);
  selective_scan_naive_backward(p, r.grads(dy.data(), d_final.data()));
  return r;
}

template <typename T>
class SelectiveScan : public ::testing::Test {};
TYPED_TEST_SUITE(SelectiveScan, testing::StorageTypes);

TYPED_TEST(SelectiveScan, EqualsTheOracle) {
  using T = TypeParam;
  const double tol = std::is_same_v<T, double> ? 1e-12 : 2 * tolerance<T>();
  for (const Case& c : kCases) {
    const Data<T> data(c);
    const Results<double> want = run_naive(data);
    testing::for_each_target([&](const std::string& target) {
      const Results<T> r = run(data);
      testing::expect_close(r.y, want.y, tol, target + " y");
      testing::expect_close(r.final_state, want.final_state, tol, target + " final_state");
      testing::expect_close(r.dx, want.dx, tol, target + " dx");
      testing::expect_close(r.ddt, want.ddt, tol, target + " ddt");
      testing::expect_close(r.dA, want.dA, tol, target + " dA");
      testing::expect_close(r.dB, want.dB, tol, target + " dB");
      testing::expect_close(r.dC, want.dC, tol, target + " dC");
      testing::expect_close(r.dD, want.dD, tol, target + " dD");
      testing::expect_close(r.ddt_bias, want.ddt_bias, tol, target + " ddt_bias");
      testing::expect_close(r.d_initial, want.d_initial, tol, target + " d_initial");
    });
  }
}

// The oracle itself against differences.
TEST(SelectiveScanOracle, GradientsEqualDifferences) {
  for (const Case& c : {Case{2, 3, {4, 0, 3}, true, false, true}, Case{2, 2, {5}, true, true, true},
                        Case{1, 2, {4}, false, false, true}}) {
    Data<double> data(c);
    const Results<double> r = run_naive(data);
    const auto loss = [&] {
      Results<double> out(data);
      selective_scan_naive_forward(data.params(), out.y.data(), out.final_state.data());
      return dot(out.y, data.dy) + dot(out.final_state, data.d_final);
    };
    testing::expect_gradient(data.x, r.dx, loss, "x");
    testing::expect_gradient(data.dt, r.ddt, loss, "dt");
    testing::expect_gradient(data.A, r.dA, loss, "A");
    testing::expect_gradient(data.B, r.dB, loss, "B");
    testing::expect_gradient(data.C, r.dC, loss, "C");
    testing::expect_gradient(data.D, r.dD, loss, "D");
    testing::expect_gradient(data.dt_bias, r.ddt_bias, loss, "dt_bias");
    testing::expect_gradient(data.initial, r.d_initial, loss, "initial");
  }
}

TEST(SelectiveScanGradients, AbsentOnesAreZero) {
  Data<double> data(kCases[1]);
  const Results<double> no_dy = run(data, false, true), no_final = run(data, true, false);
  std::fill(data.d_final.begin(), data.d_final.end(), 0.0);
  testing::expect_close(no_final.dx, run_naive(data).dx, 1e-12, "dx");
  Data<double> other(kCases[1]);
  std::fill(other.dy.begin(), other.dy.end(), 0.0);
  testing::expect_close(no_dy.dB, run_naive(other).dB, 1e-12, "dB");
}

TYPED_TEST(SelectiveScan, StepsEqualTheForwardPass) {
  using T = TypeParam;
  for (const Case& shape :
       {Case{37, 16, {9, 9}, true, false, true}, Case{70, 5, {6, 6}, true, true, true}}) {
    const Data<T> data(shape);
    const Results<double> want = run_naive(data);
    testing::for_each_target([&](const std::string& target) {
      const int64_t T_len = shape.lengths[0], C = shape.channels, S = shape.states;
      // Sequence 0 lives in slot 2 and sequence 1 in slot 0 of three; slot 1 must stay as it is.
      const std::vector<int64_t> slots = {2, -1, 0};
      std::vector<Acc<T>> pool(3 * C * S, Acc<T>{7});
      std::copy_n(data.initial.begin(), C * S, pool.begin() + 2 * C * S);
      std::copy_n(data.initial.begin() + C * S, C * S, pool.begin());
      std::vector<T> y(data.x.size());
      for (int64_t t = 0; t < T_len; ++t) {
        SelectiveScanParams p = data.params();
        const auto rows = [&](const std::vector<T>& from, int64_t width) {
          std::vector<T> out(3 * width);
          for (int64_t n : {0, 1})
            std::copy_n(from.begin() + (n * T_len + t) * width, width, out.begin() + 2 * n * width);
          return out;
        };
        const auto x = rows(data.x, C), dt = rows(data.dt, C), B = rows(data.B, S),
                   Cs = rows(data.C, S);
        p.num_sequences = 3;
        p.x = x.data();
        p.dt = dt.data();
        p.B = B.data();
        p.C = Cs.data();
        p.cu_seqlens = nullptr;
        p.total_tokens = 3;
        std::vector<T> out(3 * C);
        store(&out[C], Acc<T>{5});
        selective_scan_step(p, pool.data(), 3, slots.data(), out.data());
        for (int64_t n : {0, 1})
          std::copy_n(out.begin() + 2 * n * C, C, y.begin() + (n * T_len + t) * C);
        for (int64_t c = 0; c < C; ++c) ASSERT_EQ(load(&out[C + c]), 0) << "no sequence";
      }
      testing::expect_close(y, want.y, 2 * tolerance<T>(), target);
      std::vector<double> last(want.final_state.begin() + C * S, want.final_state.end());
      last.insert(last.end(), C * S, 7.0);
      last.insert(last.end(), want.final_state.begin(), want.final_state.begin() + C * S);
      testing::expect_close(pool, last, 2 * tolerance<Acc<T>>(), target + " pool");
    });
  }
}

TEST(SelectiveScanThreads, SameBits) {
  const Data<float> data({200, 16, {40, 0, 70, 3}, true, false, true});
  testing::expect_same_bits_for_any_threads([&] {
    const Results<float> r = run(data);
    std::vector<float> all = r.y;
    for (const auto* v : {&r.dx, &r.ddt, &r.dB, &r.dC, &r.dA, &r.dD, &r.ddt_bias, &r.d_initial})
      all.insert(all.end(), v->begin(), v->end());
    return all;
  });
}

TEST(SelectiveScanInput, NanStaysNanAndLongDecayIsZero) {
  Data<float> data({16, 4, {3}, true, false, false});
  data.A[0] = std::nanf("");
  std::fill(data.A.begin() + 4, data.A.begin() + 8, -1e4f);
  const Results<float> r = run(data);
  EXPECT_TRUE(std::isnan(r.y[16]));
  const std::vector<double> want = run_naive(data).y;
  for (int64_t t = 0; t < 3; ++t) EXPECT_NEAR(r.y[t * 16 + 1], want[t * 16 + 1], 1e-5);
}

TEST(SelectiveScanInput, Rejected) {
  SelectiveScanParams p;
  p.channels = 4;
  EXPECT_THROW(selective_scan_chunks(p), Error);
  p.states = 2;
  p.num_sequences = 2;
  p.total_tokens = 3;
  EXPECT_THROW(selective_scan_chunks(p), Error);
  p.total_tokens = 2;
  const int64_t slots[] = {0, 3};
  EXPECT_THROW(selective_scan_step(p, nullptr, 3, slots, nullptr), Error);
}

}  // namespace
}  // namespace gdn
