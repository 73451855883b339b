// SPDX-License-Identifier: Apache-2.0
// The chunk form, forward and backward, against the oracle.
#include "gdn/base/parallel.h"
#include "tests/kernels/delta_rule_problem.h"
#include "tests/kernels/support.h"

namespace gdn::delta_rule_test {
namespace {

void check(const Case& c, double bound) {
  Problem problem(c);
  expect_close(problem.chunk(), problem.naive(), bound, name(c));
}

TEST(DeltaRuleChunk, EveryMemberInDouble) {
  uint64_t seed = 100;
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : kErases) {
      for (const GateRange range :
           {GateRange::kMild, GateRange::kStrong, GateRange::kMixedExtreme}) {
        if (gate == DeltaGate::kNone && range != GateRange::kMild) continue;
        Case c;
        c.gate = gate;
        c.erase = erase;
        c.range = range;
        c.seed = ++seed;
        c.channel_beta = seed % 4 < 2;
        c.l2norm_qk = seed % 5 < 3;
        c.HV = seed % 2 == 0 ? 2 : 4;
        c.K = 11;
        c.V = 19;
        c.lengths = {37, 0, 16, 1, 150};
        c.chunk_size = seed % 3 == 0 ? 64 : seed % 3 == 1 ? 32 : 16;
        check(c, 1e-10);
      }
    }
  }
}

TEST(DeltaRuleChunk, EveryMemberInFloat) {
  uint64_t seed = 200;
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : kErases) {
      for (const GateRange range :
           {GateRange::kMild, GateRange::kStrong, GateRange::kMixedExtreme}) {
        if (gate == DeltaGate::kNone && range != GateRange::kMild) continue;
        Case c;
        c.gate = gate;
        c.erase = erase;
        c.range = range;
        c.dtype = DType::kF32;
        c.seed = ++seed;
        c.channel_beta = seed % 4 == 0;
        c.l2norm_qk = seed % 5 == 0;
        c.K = 40;
        c.V = 36;
        c.lengths = {83, 64, 5};
        c.chunk_size = seed % 3 == 0 ? 64 : seed % 3 == 1 ? 0 : 16;
        check(c, 2e-5);
      }
    }
  }
}

// Every instruction set this machine has runs the same cases.
TEST(DeltaRuleChunk, EveryInstructionSet) {
  testing::for_each_target([&](const std::string& target) {
    for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
      for (const DeltaErase erase : {DeltaErase::kKey, DeltaErase::kSeparate}) {
        for (const DType dtype : {DType::kF64, DType::kF32, DType::kF16}) {
          Case c;
          c.gate = gate;
          c.erase = erase;
          c.dtype = dtype;
          c.channel_beta = dtype == DType::kF32;
          c.K = 20;
          c.V = 21;
          c.lengths = {40, 3};
          c.chunk_size = 32;
          check(c, dtype == DType::kF64 ? 1e-10 : dtype == DType::kF32 ? 2e-5 : 6e-4);
        }
      }
    }
    Problem problem{Case()};
    Results r = problem.poisoned();
    delta_rule_recurrent_forward(problem.params, {r.o.data(), r.final_state.data(), nullptr});
    EXPECT_LE(relative_error(r.o, problem.naive().o), 1e-13) << target;
  });
}

TEST(DeltaRuleChunk, HalfPrecisionStorage) {
  for (const DeltaErase erase : kErases) {
    for (const DeltaGate gate : kGates) {
      Case c;
      c.gate = gate;
      c.erase = erase;
      c.K = 24;
      c.V = 20;
      c.lengths = {50};
      c.dtype = DType::kF16;
      check(c, 6e-4);  // rounding of the output alone: at most 2^-11 of each element
      c.dtype = DType::kBF16;
      check(c, 4e-3);  // 2^-8, rms less than half of it
    }
  }
}

TEST(DeltaRuleChunk, HeadSizes) {
  const int64_t sizes[][2] = {{1, 1},     {60, 60},   {96, 96},   {100, 128}, {128, 100},
                              {128, 200}, {200, 128}, {400, 400}, {1, 70},    {70, 1}};
  for (const auto& [K, V] : sizes) {
    for (const DType dtype : {DType::kF64, DType::kF32}) {
      Case c;
      c.gate = K % 3 == 0 ? DeltaGate::kChannel : DeltaGate::kScalar;
      c.dtype = dtype;
      c.H = c.HV = 1;
      c.K = K;
      c.V = V;
      c.lengths = {40};
      c.chunk_size = 0;
      check(c, dtype == DType::kF64 ? 1e-10 : 2e-5);
    }
  }
}

// Each factor's every value meets every other factor's somewhere.
TEST(DeltaRuleChunk, OptionsInCombination) {
  const std::vector<std::vector<int64_t>> lengths = {{130}, {16, 16}, {3, 0, 0, 70, 33}, {0}, {}};
  uint64_t seed = 300;
  for (size_t i = 0; i < 60; ++i) {
    Case c;
    c.gate = kGates[i % 3];
    c.erase = kErases[i / 3 % 4];
    c.lengths = lengths[i % 5];
    c.H = 1 + i % 2;
    c.HV = c.H * (1 + i / 2 % 3);
    c.beta = i % 7 % 2 == 0;
    c.channel_beta = i % 5 % 2 == 0;
    c.l2norm_qk = i % 17 % 2 == 0;
    c.initial = i % 11 % 2 == 0;
    c.final_state = i % 13 % 2 == 0;
    c.chunk_size = (const int[]){0, 16, 32, 64}[(i + i / 4) % 4];
    c.K = 5 + i % 6;
    c.V = 3 + i % 9;
    c.seed = ++seed;
    check(c, 1e-10);
  }
}

TEST(DeltaRuleChunk, EqualLengthsNeedNoCuSeqlens) {
  Case c;
  c.lengths = {35, 35, 35};
  Problem packed(c);
  c.packed = false;
  Problem plain(c);
  expect_same_bits(packed.chunk(), plain.chunk(), name(c));
}

TEST(DeltaRuleChunk, SavingDoesNotChangeTheOutput) {
  Case c;
  c.lengths = {300, 20};
  Problem problem(c);
  const Results with = problem.chunk();
  Results without = problem.poisoned();
  delta_rule_chunk_forward(problem.params, {without.o.data(), without.final_state.data(), nullptr});
  EXPECT_EQ(with.o.bytes(), without.o.bytes());
  EXPECT_EQ(with.final_state.bytes(), without.final_state.bytes());
}

TEST(DeltaRuleChunk, MissingOutputGradientsMeanZero) {
  Case c;
  Problem problem(c);
  problem.d_o = Buffer(c.dtype, Vec(problem.value_size(), 0.0));
  const Results expected = problem.naive();
  problem.d_o = Buffer();
  expect_close(
      problem.chunk(),
      [&] {
        Results r = problem.chunk();
        r.dq = expected.dq;
        r.dk = expected.dk;
        r.dv = expected.dv;
        r.dg = expected.dg;
        r.dbeta = expected.dbeta;
        r.d_initial = expected.d_initial;
        return r;
      }(),
      1e-10, name(c));
}

TEST(DeltaRuleChunk, SplitAnywhereEqualsWhole) {
  for (const DeltaErase erase : kErases) {
    Case c;
    c.erase = erase;
    c.gate = erase == DeltaErase::kOwn ? DeltaGate::kChannel : DeltaGate::kScalar;
    c.H = c.HV = 1;
    c.lengths = {45};
    Problem whole(c);
    const Results expected = whole.naive();
    for (const int64_t split : {1, 15, 16, 17, 44}) {
      std::vector<Buffer> states;
      Buffer o = Buffer::poisoned(c.dtype, whole.value_size());
      Buffer middle = Buffer::poisoned(c.dtype, whole.state_size);
      Buffer last = Buffer::poisoned(c.dtype, whole.state_size);
      const auto part = [&](int64_t begin, int64_t end, const void* from, Buffer& to) {
        DeltaRuleParams x = whole.params;
        x.total_tokens = end - begin;
        x.cu_seqlens = nullptr;
        const auto at = [&](const void* p, int64_t width) -> const void* {
          return p == nullptr ? nullptr : static_cast<const double*>(p) + begin * width;
        };
        x.q = at(x.q, c.K);
        x.k = at(x.k, c.K);
        x.v = at(x.v, c.V);
        x.a = at(x.a, c.K);
        x.p = at(x.p, c.K);
        x.g = at(x.g, c.gate == DeltaGate::kChannel ? c.K : 1);
        x.beta = at(x.beta, 1);
        x.initial_state = from;
        delta_rule_chunk_forward(
            x, {static_cast<double*>(o.data()) + begin * c.V, to.data(), nullptr});
      };
      part(0, split, whole.params.initial_state, middle);
      part(split, 45, middle.data(), last);
      EXPECT_LE(relative_error(o, expected.o), 1e-12) << split << " of " << name(c);
      EXPECT_LE(relative_error(last, expected.final_state), 1e-12) << split << " of " << name(c);
    }
  }
}

TEST(DeltaRuleChunk, SameBitsForAnyNumberOfThreads) {
  for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
    Case c;
    c.gate = gate;
    c.dtype = DType::kF32;
    c.H = 2;
    c.HV = 4;
    c.K = c.V = 48;
    c.lengths = {70, 9, 140};
    Problem problem(c);
    const int before = num_threads();
    set_num_threads(1);
    const Results one = problem.chunk();
    for (int threads = 2; threads <= 4; ++threads) {
      set_num_threads(threads);
      expect_same_bits(one, problem.chunk(), name(c));
    }
    set_num_threads(before);
  }
}

// Heads that are left over from the threads, and sequences that are longer than a thread's share,
// are cut by columns of values (forward) or done by all threads (backward).
TEST(DeltaRuleChunk, FewHeadsShareTheWork) {
  struct Heads {
    int64_t H, HV;
  };
  uint64_t seed = 600;
  for (const Heads heads : {Heads{1, 1}, {3, 3}, {1, 3}}) {
    for (const DeltaErase erase : {DeltaErase::kKey, DeltaErase::kSeparate}) {
      Case c;
      c.erase = erase;
      c.gate = heads.H == 3 ? DeltaGate::kChannel : DeltaGate::kScalar;
      c.dtype = DType::kF32;
      c.seed = ++seed;
      c.l2norm_qk = heads.HV == 3;
      c.H = heads.H;
      c.HV = heads.HV;
      c.K = 24;
      c.V = 75;
      c.lengths = heads.HV == 3 ? std::vector<int64_t>{590} : std::vector<int64_t>{20, 590, 130};
      c.chunk_size = seed % 2 == 0 ? 16 : 32;
      Problem problem(c);
      const int before = num_threads();
      set_num_threads(1);
      const Results one = problem.chunk();
      expect_close(one, problem.naive(), 2e-5, name(c));
      for (int threads = 2; threads <= 4; ++threads) {
        set_num_threads(threads);
        expect_same_bits(one, problem.chunk(), name(c));
      }
      set_num_threads(before);
    }
  }
}

TEST(DeltaRuleChunk, SavedIsAtMostOneAndAHalfTimesTheInputs) {
  for (const int64_t T : {512, 4096, 65536}) {
    for (const int64_t size : {32, 64, 128, 192, 256}) {
      for (const int64_t group : {1, 2, 4}) {
        DeltaRuleParams x;
        x.num_sequences = 1;
        x.total_tokens = T;
        x.H = 16 / group;
        x.HV = 16;
        x.K = x.V = size;
        x.q = x.k = x.v = &x;  // only sizes are looked at
        const int64_t inputs = T * (2 * x.H * x.K + x.HV * x.V);
        EXPECT_LE(2 * delta_rule_saved_size(x), 3 * inputs)
            << "T=" << T << " K=V=" << size << " group " << group;
      }
    }
  }
}

TEST(DeltaRuleChunk, RejectsWhatDoesNotFit) {
  const auto message = [](auto change) -> std::string {
    Problem problem{Case()};
    change(problem);
    Results r = problem.poisoned();
    try {
      delta_rule_chunk_forward(problem.params, {r.o.data(), nullptr, nullptr});
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message([](Problem& p) {}), "");
  EXPECT_EQ(message([](Problem& p) { p.params.H = 3; }),
            "[delta_rule_chunk_forward] HV must be a multiple of H, got HV=2 H=3");
  EXPECT_EQ(message([](Problem& p) { p.params.chunk_size = 48; }),
            "[delta_rule_chunk_forward] chunk_size must be 16, 32, 64 or 0 (automatic), got 48");
  EXPECT_EQ(message([](Problem& p) { p.cu_seqlens[1] = 20; }),
            "[delta_rule_chunk_forward] cu_seqlens must end with the number of tokens 21, got 20");
  EXPECT_EQ(message([](Problem& p) { p.cu_seqlens[0] = 1; }),
            "[delta_rule_chunk_forward] cu_seqlens must start with 0, got 1");
  EXPECT_NE(message([](Problem& p) { p.params.g = nullptr; }), "");
  EXPECT_NE(message([](Problem& p) { p.params.erase = DeltaErase::kOwn; }), "");
  EXPECT_NE(message([](Problem& p) { p.params.erase = DeltaErase::kSeparate; }), "");
  EXPECT_NE(message([](Problem& p) { p.params.K = 0; }), "");
}

}  // namespace
}  // namespace gdn::delta_rule_test
