// SPDX-License-Identifier: Apache-2.0
// The recurrence by whole sequences and the step in place, against the oracle.
#include <algorithm>

#include "gdn/base/parallel.h"
#include "tests/kernels/delta_rule_problem.h"

namespace gdn::delta_rule_test {
namespace {

Results recurrent(Problem& problem) {
  Results r = problem.poisoned();
  delta_rule_recurrent_forward(problem.params, {r.o.data(), r.final_state.data(), nullptr});
  return r;
}

void check_recurrent(const Case& c, double bound) {
  Problem problem(c);
  const Results r = recurrent(problem), expected = problem.naive();
  EXPECT_LE(relative_error(r.o, expected.o), bound) << name(c);
  EXPECT_LE(relative_error(r.final_state, expected.final_state), bound) << name(c);
}

TEST(DeltaRuleRecurrent, EveryMemberAndDtype) {
  const std::pair<DType, double> dtypes[] = {
      {DType::kF64, 1e-13}, {DType::kF32, 3e-6}, {DType::kF16, 6e-4}, {DType::kBF16, 4e-3}};
  uint64_t seed = 400;
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : kErases) {
      for (const auto& [dtype, bound] : dtypes) {
        Case c;
        c.gate = gate;
        c.erase = erase;
        c.dtype = dtype;
        c.range = static_cast<GateRange>(seed % 3);
        c.seed = ++seed;
        c.HV = 2 * (1 + seed % 3);
        c.K = 5 + seed % 30;
        c.V = 3 + seed % 41;
        c.lengths = {17, 0, 1, 40};
        c.initial = seed % 3 != 0;
        c.beta = seed % 5 != 0;
        c.channel_beta = seed % 4 < 2;
        c.l2norm_qk = seed % 3 == 0;
        check_recurrent(c, bound);
      }
    }
  }
}

TEST(DeltaRuleRecurrent, HeadSizes) {
  for (const int64_t K : {1, 60, 128, 200}) {
    for (const int64_t V : {1, 33, 100, 128, 400}) {
      Case c;
      c.H = c.HV = 1;
      c.K = K;
      c.V = V;
      c.dtype = DType::kF32;
      c.lengths = {5};
      check_recurrent(c, 3e-6);
    }
  }
}

TEST(DeltaRuleRecurrent, RefusesToSave) {
  Problem problem{Case()};
  Results r = problem.poisoned();
  double saved = 0.0;
  EXPECT_THROW(delta_rule_recurrent_forward(problem.params, {r.o.data(), nullptr, &saved}), Error);
}

// Parameters of token t alone of every sequence; all sequences have the same length.
class TokenByToken {
 public:
  TokenByToken(Problem& problem, int64_t length) : x_(problem.params), length_(length) {
    elem_ = size_of(x_.dtype);
    acc_ = x_.dtype == DType::kF64 ? 8 : 4;
  }
  DeltaRuleParams at(int64_t t) {
    DeltaRuleParams x = x_;
    x.cu_seqlens = nullptr;
    x.initial_state = nullptr;
    x.total_tokens = x.num_sequences;
    x.q = gather(0, x_.q, t, x.H * x.K * elem_);
    x.k = gather(1, x_.k, t, x.H * x.K * elem_);
    x.v = gather(2, x_.v, t, x.HV * x.V * elem_);
    x.a = gather(3, x_.a, t, x.H * x.K * elem_);
    x.p = gather(4, x_.p, t, x.H * x.K * elem_);
    x.g = gather(5, x_.g, t, x.HV * (x.gate == DeltaGate::kChannel ? x.K : 1) * acc_);
    x.beta = gather(6, x_.beta, t, x.HV * (x.channel_beta ? x.V : 1) * acc_);
    return x;
  }

 private:
  const void* gather(int which, const void* src, int64_t t, int64_t bytes) {
    if (src == nullptr) return nullptr;
    auto& rows = rows_[which];
    rows.resize(x_.num_sequences * bytes);
    for (int64_t n = 0; n < x_.num_sequences; ++n) {
      const auto* p = static_cast<const unsigned char*>(src) + (n * length_ + t) * bytes;
      std::copy(p, p + bytes, rows.begin() + n * bytes);
    }
    return rows.data();
  }
  DeltaRuleParams x_;
  int64_t length_, elem_, acc_;
  std::vector<unsigned char> rows_[7];
};

TEST(DeltaRuleStep, StepsEqualTheWholeSequence) {
  uint64_t seed = 500;
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : kErases) {
      for (const int64_t V : {3, 128, 100}) {
        Case c;
        c.gate = gate;
        c.erase = erase;
        c.seed = ++seed;
        c.HV = seed % 2 == 0 ? 2 : 4;
        c.K = 7 + seed % 20;
        c.V = V;
        c.dtype = seed % 3 == 0 ? DType::kF32 : DType::kF64;
        c.beta = seed % 4 != 0;
        c.channel_beta = seed % 8 < 4;
        c.l2norm_qk = seed % 5 < 2;
        constexpr int64_t kLength = 6;
        c.lengths = {kLength, kLength, kLength};
        const double bound = c.dtype == DType::kF32 ? 2e-6 : 1e-13;
        Problem problem(c);
        const Results expected = problem.naive();
        // Sequence n lives in slots[n] of a larger pool.
        const std::vector<int64_t> slots = {4, 0, 3};
        const int64_t size = c.HV * c.K * c.V;
        const Vec start = problem.initial.values();
        Vec pool(5 * size, 77.0);
        for (int64_t n = 0; n < 3; ++n) {
          std::copy_n(start.begin() + n * size, size, pool.begin() + slots[n] * size);
        }
        Buffer states(problem.acc(), pool);
        TokenByToken tokens(problem, kLength);
        Vec o(problem.value_size());
        const int64_t width = c.HV * c.V;
        for (int64_t t = 0; t < kLength; ++t) {
          Buffer out = Buffer::poisoned(c.dtype, 3 * width);
          delta_rule_step(tokens.at(t), {states.data(), 5, slots.data()}, out.data());
          const Vec values = out.values();
          for (int64_t n = 0; n < 3; ++n) {
            std::copy_n(values.begin() + n * width, width, o.begin() + (n * kLength + t) * width);
          }
        }
        EXPECT_LE(relative_error(Buffer(DType::kF64, o), expected.o), bound) << name(c);
        const Vec after = states.values();
        Vec last(3 * size);
        for (int64_t n = 0; n < 3; ++n) {
          std::copy_n(after.begin() + slots[n] * size, size, last.begin() + n * size);
        }
        EXPECT_LE(relative_error(Buffer(DType::kF64, last), expected.final_state), bound)
            << name(c);
        for (const int64_t untouched : {1, 2}) {
          const auto begin = after.begin() + untouched * size;
          EXPECT_EQ(std::count(begin, begin + size, 77.0), size) << name(c);
        }
      }
    }
  }
}

TEST(DeltaRuleStep, NegativeSlotsAreNoSequence) {
  Case c;
  c.lengths = {1, 1, 1};
  c.initial = false;
  Problem problem(c);
  const int64_t size = c.HV * c.K * c.V, width = c.HV * c.V;
  Buffer states(DType::kF64, Vec(2 * size, 0.5));
  Buffer o = Buffer::poisoned(c.dtype, problem.value_size());
  const std::vector<int64_t> slots = {-1, 1, -7};
  delta_rule_step(problem.params, {states.data(), 2, slots.data()}, o.data());
  const Vec out = o.values(), after = states.values();
  EXPECT_EQ(std::count(out.begin(), out.begin() + width, 0.0), width);
  EXPECT_EQ(std::count(out.begin() + 2 * width, out.end(), 0.0), width);
  EXPECT_EQ(std::count(out.begin() + width, out.begin() + 2 * width, 0.0), 0);
  EXPECT_EQ(std::count(after.begin(), after.begin() + size, 0.5), size);
  EXPECT_NE(std::count(after.begin() + size, after.end(), 0.5), size);
  const std::vector<int64_t> outside = {0, 2, 1};
  EXPECT_THROW(delta_rule_step(problem.params, {states.data(), 2, outside.data()}, o.data()),
               Error);
}

// Rounding the state after each of many steps adds about 2^-9 / sqrt(3) of the decaying sum of its
// past once per step that is remembered; with a mild decay that stays below 1 %.
TEST(DeltaRuleStep, Bf16StatesStayClose) {
  Case c;
  c.dtype = DType::kF32;
  c.HV = 4;
  c.K = 64;
  c.V = 100;
  c.l2norm_qk = true;
  constexpr int64_t kLength = 200;
  c.lengths = {kLength, kLength};
  Problem problem(c);
  const Results expected = problem.naive();
  Buffer states(DType::kBF16, problem.initial.values());
  TokenByToken tokens(problem, kLength);
  const int64_t width = c.HV * c.V;
  Vec o(problem.value_size());
  for (int64_t t = 0; t < kLength; ++t) {
    Buffer out = Buffer::poisoned(c.dtype, 2 * width);
    delta_rule_step(tokens.at(t), {states.data(), 2, nullptr, /*bf16=*/true}, out.data());
    const Vec values = out.values();
    for (int64_t n = 0; n < 2; ++n) {
      std::copy_n(values.begin() + n * width, width, o.begin() + (n * kLength + t) * width);
    }
  }
  EXPECT_LE(relative_error(Buffer(DType::kF64, o), expected.o), 1e-2);
  EXPECT_LE(relative_error(states, expected.final_state), 1e-2);
  c.dtype = DType::kF64;
  c.lengths = {1, 1};
  Problem wide(c);
  EXPECT_THROW(delta_rule_step(wide.params, {states.data(), 2, nullptr, true}, o.data()), Error);
}

TEST(DeltaRuleStep, SameBitsForAnyNumberOfThreads) {
  Case c;
  c.dtype = DType::kF32;
  c.H = c.HV = 3;
  c.K = c.V = 100;
  c.lengths.assign(8, 1);
  Problem problem(c);
  const int before = num_threads();
  std::vector<unsigned char> first;
  for (int threads = 1; threads <= 4; ++threads) {
    set_num_threads(threads);
    Buffer states = problem.initial, o = Buffer::poisoned(c.dtype, problem.value_size());
    delta_rule_step(problem.params, {states.data(), 8}, o.data());
    if (threads == 1) first = states.bytes();
    EXPECT_EQ(first, states.bytes()) << threads << " threads";
  }
  set_num_threads(before);
}

}  // namespace
}  // namespace gdn::delta_rule_test
