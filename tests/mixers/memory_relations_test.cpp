// SPDX-License-Identifier: Apache-2.0
// Where test-time memories and the delta rule are the same, and where they are not.
#include <ATen/TensorOperators.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include "gdn/ops/delta_rule.h"
#include "gdn/ops/test_time_memory.h"

namespace gdn {
namespace {

using at::Tensor;

struct Inputs {
  Tensor q, k, v, rate, start;

  Inputs() {
    torch::manual_seed(11);
    q = at::randn({2, 37, 3, 6}, at::kDouble);
    k = at::randn({2, 37, 3, 6}, at::kDouble);
    k = k / k.norm(2, {3}, /*keepdim=*/true);
    v = at::randn({2, 37, 3, 6}, at::kDouble);
    rate = at::rand({2, 37, 3}, at::kDouble);
    start = at::randn({2, 3, 6, 6}, at::kDouble);
  }
};

Tensor delta(const Inputs& in, const Tensor& v, const Tensor& beta, ops::OptionalTensor g,
             const Tensor& start) {
  return std::get<0>(ops::delta_rule(in.q, in.k, v, g, beta, {}, {}, 1.0, start, {}, false, "key",
                                     "naive", 0, false));
}

double distance(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(MemoryRelations, TttLinearWithoutNormAndMiniBatchIsDeltaNet) {
  const Inputs in;
  ops::MemoryTensors memory;
  memory.q = in.q;
  memory.k = in.k;
  memory.v = in.v;
  memory.rate = in.rate;
  memory.tau = at::ones({1}, at::kDouble);
  memory.memory = in.start.flatten(2);
  ops::MemoryConfig config;
  config.rule = "ttt";
  config.chunk = 1;
  EXPECT_LT(distance(ops::test_time_memory(memory, config, false).o,
                     delta(in, in.v, in.rate, {}, in.start)),
            1e-12);
  // With the residual, f(x) = x + x W: the target loses k, the output gains q, and the delta rule
  // starts from I + W.
  memory.v = in.v - in.k;
  const Tensor with_residual = in.q + ops::test_time_memory(memory, config, false).o;
  const Tensor identity = at::eye(6, at::kDouble);
  EXPECT_LT(distance(with_residual, delta(in, in.v, in.rate, {}, in.start + identity)), 1e-12);
  EXPECT_GT(distance(with_residual, delta(in, in.v, in.rate, {}, in.start)), 1e-2);
}

TEST(MemoryRelations, LinearLmmWithoutMomentumReadsTheUndecayedState) {
  const Inputs in;
  const double c = 2;
  ops::MemoryTensors memory;
  memory.q = in.q;
  memory.k = in.k;
  memory.v = in.v;
  memory.rate = in.rate * 0.3;
  memory.alpha = at::rand({2, 37, 3}, at::kDouble) * 0.4;
  memory.memory = in.start.flatten(2);
  ops::MemoryConfig config;
  config.chunk = 1;
  config.sequential = true;
  config.loss_scale = c;
  const Tensor o = ops::test_time_memory(memory, config, false).o;
  const Tensor keep = 1 - memory.alpha, g = at::log1p(-memory.alpha), beta = c * memory.rate;
  // The gated delta rule reads after the decay: the same map with other strengths and values.
  EXPECT_LT(distance(o, delta(in, keep.unsqueeze(3) * in.v, beta / keep, g, in.start)), 1e-12);
  EXPECT_GT(distance(o, delta(in, in.v, beta, g, in.start)), 1e-2);
  // Without forgetting the two are one.
  memory.alpha = Tensor();
  EXPECT_LT(
      distance(ops::test_time_memory(memory, config, false).o, delta(in, in.v, beta, {}, in.start)),
      1e-12);
}

}  // namespace
}  // namespace gdn
