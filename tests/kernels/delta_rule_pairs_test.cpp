// SPDX-License-Identifier: Apache-2.0
// The chunk form with bf16 products, forward and backward, against the oracle, on every backend
// that this CPU has.
#include <string>

#include "gdn/base/parallel.h"
#include "tests/kernels/delta_rule_problem.h"
#include "tests/kernels/pair_backend.h"

namespace gdn::delta_rule_test {
namespace {

// Each operand of a product is rounded by 2^-9 of itself at most, as is each output: the oracle
// gets the same bf16 inputs, so what differs is the roundings inside.
constexpr double kBound = 6e-3;

class DeltaRulePairs : public PairBackendTest {};

Case bf16_case() {
  Case c;
  c.dtype = DType::kBF16;
  c.K = c.V = 32;
  c.lengths = {83};
  c.chunk_size = 0;
  return c;
}

void check(const Case& c, double bound = kBound) {
  Problem problem(c);
  expect_close(problem.chunk(), problem.naive(), bound, name(c));
}

// Whether bf16 products took part: fp32 gives other bits.
bool multiplies_pairs(const Case& c) {
  Problem problem(c);
  const std::string backend = pair_backend();
  const Results with = problem.chunk();
  choose_pairs("off");
  const Results without = problem.chunk();
  PairBackendTest::choose(backend);
  return with.o.bytes() != without.o.bytes();
}

TEST_P(DeltaRulePairs, EveryMergedMember) {
  uint64_t seed = 700;
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : {DeltaErase::kNone, DeltaErase::kKey, DeltaErase::kOwn}) {
      for (const GateRange range :
           {GateRange::kMild, GateRange::kStrong, GateRange::kMixedExtreme}) {
        if (gate == DeltaGate::kNone && range != GateRange::kMild) continue;
        Case c = bf16_case();
        c.gate = gate;
        c.erase = erase;
        c.range = range;
        c.seed = ++seed;
        c.channel_beta = seed % 4 == 0;
        c.l2norm_qk = seed % 3 == 0;
        c.HV = seed % 2 == 0 ? 2 : 4;
        c.lengths = {83, 0, 64, 1, 150};
        c.chunk_size = seed % 2 == 0 ? 64 : 32;
        check(c);
        EXPECT_TRUE(multiplies_pairs(c)) << name(c);
      }
    }
  }
}

TEST_P(DeltaRulePairs, HeadSizes) {
  const int64_t sizes[][2] = {{16, 16}, {48, 80}, {128, 128}, {64, 16}, {96, 112}, {256, 32}};
  for (const auto& [K, V] : sizes) {
    for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
      Case c = bf16_case();
      c.gate = gate;
      c.H = c.HV = 1;
      c.K = K;
      c.V = V;
      c.chunk_size = 32;
      check(c);
      EXPECT_TRUE(multiplies_pairs(c)) << name(c);
    }
  }
}

TEST_P(DeltaRulePairs, OptionsInCombination) {
  const std::vector<std::vector<int64_t>> lengths = {{130}, {32, 32}, {3, 0, 0, 70, 33}, {0}, {}};
  uint64_t seed = 800;
  for (size_t i = 0; i < 36; ++i) {
    Case c = bf16_case();
    c.gate = kGates[i % 3];
    c.erase = kErases[i / 3 % 3];
    c.lengths = lengths[i % 5];
    c.H = 1 + i % 2;
    c.HV = c.H * (1 + i / 2 % 3);
    c.beta = i % 7 % 2 == 0;
    c.channel_beta = i % 5 % 2 == 0;
    c.l2norm_qk = i % 4 < 2;
    c.initial = i % 11 % 2 == 0;
    c.final_state = i % 13 % 2 == 0;
    c.chunk_size = (const int[]){32, 64}[(i + i / 4) % 2];
    c.K = 16 * (1 + i % 3);
    c.V = 16 * (1 + i / 3 % 4);
    c.seed = ++seed;
    // Short keys, beta up to 2 and no gate: the recurrence itself amplifies errors.
    check(c, c.gate == DeltaGate::kNone ? 1e-2 : kBound);
  }
}

// Cases that pairs cannot hold, or do not pay for, are computed in fp32.
TEST_P(DeltaRulePairs, TheRestStaysInFp32) {
  for (int i = 0; i < 7; ++i) {
    Case c = bf16_case();
    if (i == 0) c.erase = DeltaErase::kSeparate;
    if (i == 1) c.K = 24;
    if (i == 2) c.V = 40;
    if (i == 3) c.chunk_size = 16;
    if (i == 4) c.K = 16;
    if (i == 5) c.V = 16;
    if (i == 6) c.lengths = {40, 20, 30};
    EXPECT_FALSE(multiplies_pairs(c)) << name(c);
    check(c);
  }
}

TEST_P(DeltaRulePairs, SameBitsForAnyNumberOfThreads) {
  const int before = num_threads();
  for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
    for (const bool few_heads : {false, true}) {
      Case c = bf16_case();
      c.gate = gate;
      c.H = few_heads ? 1 : 2;
      c.HV = few_heads ? 3 : 4;
      c.V = 80;
      c.lengths = few_heads ? std::vector<int64_t>{590} : std::vector<int64_t>{70, 9, 140};
      Problem problem(c);
      set_num_threads(1);
      const Results one = problem.chunk();
      expect_close(one, problem.naive(), kBound, name(c));
      for (int threads = 2; threads <= 4; ++threads) {
        set_num_threads(threads);
        expect_same_bits(one, problem.chunk(), name(c));
      }
    }
  }
  set_num_threads(before);
}

TEST_P(DeltaRulePairs, SavingDoesNotChangeTheOutput) {
  Case c = bf16_case();
  c.lengths = {300, 20};
  Problem problem(c);
  const Results with = problem.chunk();
  Results without = problem.poisoned();
  delta_rule_chunk_forward(problem.params, {without.o.data(), without.final_state.data(), nullptr});
  EXPECT_EQ(with.o.bytes(), without.o.bytes());
  EXPECT_EQ(with.final_state.bytes(), without.final_state.bytes());
}

// What one sequence leaves in a workspace, NaN included, does not reach the next one.
TEST_P(DeltaRulePairs, NothingOfADivergedHeadRemains) {
  Case c = bf16_case();
  c.H = c.HV = 1;
  c.lengths = {40, 45};
  Problem problem(c);
  const Results expected = problem.chunk();
  const int64_t state = c.K * c.V;
  Vec initial = problem.initial.values();
  std::fill_n(initial.begin(), state, std::numeric_limits<double>::quiet_NaN());
  problem.initial = Buffer(DType::kF32, initial);
  problem.params.initial_state = problem.initial.data();
  const int before = num_threads();
  set_num_threads(1);
  const Results r = problem.chunk();
  set_num_threads(before);
  const Vec o = r.o.values(), good = expected.o.values(), dq = r.dq.values(),
            good_dq = expected.dq.values();
  for (int64_t i = 0; i < 40 * c.V; ++i) EXPECT_TRUE(std::isnan(o[i])) << i;
  for (size_t i = 40 * c.V; i < o.size(); ++i) EXPECT_EQ(o[i], good[i]) << i;
  for (size_t i = 40 * c.K; i < dq.size(); ++i) EXPECT_EQ(dq[i], good_dq[i]) << i;
}

// The bound of the README on the problem it names: 512 tokens, unit queries and keys, mild decay.
TEST_P(DeltaRulePairs, ErrorBound) {
  for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
    Case c = bf16_case();
    c.gate = gate;
    c.H = c.HV = std::string(GetParam()) == "avx512" ? 16 : 2;
    c.K = c.V = 128;
    c.lengths = {512};
    Problem problem(c);
    Rng rng(5);
    for (Buffer* x : {&problem.q, &problem.k}) {
      Vec v(problem.key_size());
      for (size_t i = 0; i < v.size(); i += c.K) {
        double square = 0;
        for (int64_t j = 0; j < c.K; ++j) {
          v[i + j] = rng.normal();
          square += v[i + j] * v[i + j];
        }
        for (int64_t j = 0; j < c.K; ++j) v[i + j] /= std::sqrt(square);
      }
      *x = Buffer(c.dtype, v);
    }
    Vec g(problem.gate_size), beta(problem.beta_size), initial(problem.state_size);
    for (double& x : g) x = -0.1 * rng.uniform();
    for (double& x : beta) x = rng.uniform();
    for (double& x : initial) x = 0.1 * rng.normal();
    problem.g = Buffer(DType::kF32, g);
    problem.beta = Buffer(DType::kF32, beta);
    problem.initial = Buffer(DType::kF32, initial);
    problem.params.q = problem.q.data();
    problem.params.k = problem.k.data();
    problem.params.g = problem.g.data();
    problem.params.beta = problem.beta.data();
    problem.params.initial_state = problem.initial.data();
    const Results r = problem.chunk(), exact = problem.naive();
    const Vec o = r.o.values(), expected = exact.o.values();
    double error = 0, largest = 0;
    for (size_t i = 0; i < o.size(); ++i) {
      error = std::max(error, std::abs(o[i] - expected[i]));
      largest = std::max(largest, std::abs(expected[i]));
    }
    for (const auto& [tensor, e] : errors(r, exact)) {
      // A channel gate multiplies keys before they are rounded.
      const double bound = gate == DeltaGate::kScalar ? 3e-3 : 3.5e-3;
      EXPECT_LE(e, tensor == std::string("o") ? bound : 4e-3) << tensor << " of " << name(c);
      RecordProperty(str_cat(tensor, int(gate)), str_cat(e));
    }
    EXPECT_LE(error / largest, 7e-3) << name(c);
    RecordProperty(str_cat("max", int(gate)), str_cat(error / largest));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DeltaRulePairs, pair_backends(), backend_name);

}  // namespace
}  // namespace gdn::delta_rule_test
