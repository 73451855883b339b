// SPDX-License-Identifier: Apache-2.0
// Every SIMD target with every chunk size, number of threads and kind of bf16 products. `make test`
// has pairs of these (delta_rule_chunk_test, delta_rule_pairs_test); this is for `make test-all`.
#include "gdn/base/parallel.h"
#include "tests/kernels/delta_rule_problem.h"
#include "tests/kernels/pair_backend.h"
#include "tests/kernels/support.h"

namespace gdn::delta_rule_test {
namespace {

// Heads for all threads; a few, which threads share by columns or chunks.
std::vector<Case> cases(DType dtype) {
  std::vector<Case> list;
  for (const DeltaGate gate : kGates) {
    for (const bool few_heads : {false, true}) {
      Case c;
      c.gate = gate;
      c.erase = few_heads ? DeltaErase::kKey : kErases[list.size() % 3];
      c.dtype = dtype;
      c.seed = 900 + list.size();
      c.H = few_heads ? 1 : 2;
      c.HV = few_heads ? 3 : 4;
      c.K = 32;
      c.V = few_heads ? 80 : 48;
      c.lengths = few_heads ? std::vector<int64_t>{530} : std::vector<int64_t>{70, 0, 9, 140};
      c.l2norm_qk = true;
      list.push_back(c);
    }
  }
  return list;
}

// All chunk sizes and numbers of threads on each of this machine's SIMD targets that `takes_part`.
void check_all(const Case& base, double bound,
               const std::function<bool(const std::string& target)>& takes_part) {
  Problem problem(base);
  const Results expected = problem.naive();
  const int before = num_threads();
  testing::for_each_target([&](const std::string& target) {
    if (!takes_part(target)) return;
    for (const int chunk_size : {0, 16, 32, 64}) {
      problem.params.chunk_size = chunk_size;
      set_num_threads(1);
      const Results one = problem.chunk();
      const std::string what = str_cat(target, " chunks of ", chunk_size, " of ", name(base));
      expect_close(one, expected, bound, what);
      for (int threads = 2; threads <= 4; ++threads) {
        set_num_threads(threads);
        expect_same_bits(one, problem.chunk(), str_cat(threads, " threads ", what));
      }
    }
  });
  set_num_threads(before);
}

TEST(DeltaRuleSlow, FloatAndDouble) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (Case c : cases(dtype)) {
      check_all(c, dtype == DType::kF32 ? 2e-5 : 1e-10, [](const std::string&) { return true; });
      c.erase = DeltaErase::kSeparate;
      c.K = 21;
      check_all(c, dtype == DType::kF32 ? 2e-5 : 1e-10, [](const std::string&) { return true; });
    }
  }
}

class DeltaRuleProductSlow : public PairBackendTest {};

TEST_P(DeltaRuleProductSlow, Bf16) {
  int targets = 0;
  for (const Case& c : cases(DType::kBF16)) {
    check_all(c, c.gate == DeltaGate::kNone ? 1e-2 : 6e-3, [&](const std::string&) {
      const bool available = choose(GetParam());
      targets += available;
      return available;
    });
    choose(GetParam());
  }
  EXPECT_GT(targets, 0);
}

INSTANTIATE_TEST_SUITE_P(Backends, DeltaRuleProductSlow,
                         ::testing::Values("off", "emulated", "avx512", "amx"), backend_name);

}  // namespace
}  // namespace gdn::delta_rule_test
