// SPDX-License-Identifier: Apache-2.0
// Test-time memories on workspace full of NaN; what they compute is tested in tests/ops.
#include <gtest/gtest.h>

#include "gdn/kernels/scratch.h"
#include "gdn/kernels/test_time_memory/memory.h"
#include "tests/kernels/support.h"

namespace gdn {
namespace {

using Numbers = std::vector<double>;

// All results of a call forward and backward and of a step, one after the other.
Numbers run(MemoryParams p) {
  constexpr int64_t kTokens = 21;
  const auto normal = [](int64_t n, double scale, double mean = 0) {
    return testing::random_normal<double>(n, 7, scale, mean);
  };
  p.dtype = DType::kF64;
  p.num_sequences = 2;
  p.T = kTokens;
  p.H = 2;
  p.D = 5;
  p.hidden = p.depth > 1 ? 7 : 0;
  const int64_t tokens = 2 * kTokens, rows = tokens * p.H * p.D;
  const int64_t state = 4 * test_time_memory_size(p.D, p.depth, p.hidden, p.bias);
  const bool lmm = p.rule == MemoryRule::kLmm;
  const Numbers q = normal(rows, 1), k = normal(rows, 0.5), v = normal(rows, 0.7),
                rate = normal(tokens * p.H, 0.01, 0.1), decay = normal(tokens * p.H, 0.01, 0.5),
                tau = normal(p.chunk, 0.1, 1), norm = normal(p.H * p.D, 0.1, 1),
                start = normal(state, 0.3);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.rate = rate.data();
  p.eta = p.alpha = lmm ? decay.data() : nullptr;
  p.tau = lmm ? nullptr : tau.data();
  p.norm_weight = p.norm_bias = p.residual_norm ? norm.data() : nullptr;
  p.memory = start.data();

  std::vector<Numbers> results;
  const auto take = [&](int64_t n) {
    results.emplace_back(n, 0.0);
    return results.back().data();
  };
  results.reserve(16);
  Numbers saved(test_time_memory_saved_size(p));
  MemoryOutputs out;
  out.o = take(rows);
  out.memory = take(state);
  out.saved = saved.data();
  test_time_memory_forward(p, out);
  MemoryGrads grads;
  grads.o = v.data();
  grads.q = take(rows);
  grads.k = take(rows);
  grads.v = take(rows);
  grads.rate = take(tokens * p.H);
  grads.memory = take(state);
  test_time_memory_backward(p, saved.data(), grads);

  const int64_t positions[] = {0, 0};
  p.T = 1;
  Numbers momentum(state), gradient_at = start;
  MemoryStep step;
  step.params = &p;
  step.position = positions;
  step.memory = take(state);
  std::copy(start.begin(), start.end(), results.back().begin());
  step.momentum = momentum.data();
  step.gradient_at = lmm && !p.sequential && p.chunk > 1 ? gradient_at.data() : nullptr;
  step.o = take(2 * p.H * p.D);
  test_time_memory_step(step);
  Numbers all;
  for (const Numbers& r : results) all.insert(all.end(), r.begin(), r.end());
  return all;
}

TEST(MemoryWorkspace, WhatItHoldsBeforeACallDoesNotMatter) {
  for (int which = 0; which < 6; ++which) {
    MemoryParams p;
    p.rule = which < 2 ? MemoryRule::kTtt : MemoryRule::kLmm;
    p.depth = which % 2 == 0 ? 1 : 2;
    p.bias = which == 1;
    p.residual_norm = which < 2;
    p.chunk = which == 5 ? 1 : 8;
    p.sequential = which == 4;
    p.clip = which == 3 ? 0.5 : 0;
    testing::for_each_target([&](const std::string& target) {
      poison_scratch(false);
      std::memset(thread_scratch(size_t{1} << 21), 0, size_t{1} << 21);
      const Numbers zeros = run(p);
      poison_scratch(true);
      const Numbers poisoned = run(p);
      for (const double x : zeros) ASSERT_TRUE(std::isfinite(x)) << target << " " << which;
      EXPECT_TRUE(testing::same_bits(zeros, poisoned)) << target << " " << which;
    });
  }
}

}  // namespace
}  // namespace gdn
