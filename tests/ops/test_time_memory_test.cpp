// SPDX-License-Identifier: Apache-2.0
// The chunk form and the step of test-time memories against the literal token loop whose inner
// gradients are autograd's: outputs, final states, and the gradients of every input.
#include "gdn/ops/test_time_memory.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/utils.h>

#include "gdn/kernels/test_time_memory/memory.h"
#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using testing::error_of;
using testing::expect_near;
using ::testing::HasSubstr;
using testing::normal;

struct Problem {
  std::string label;
  MemoryConfig config;
  int64_t B = 2, T = 21, H = 2, D = 5;
  bool momentum = true, forgetting = true, anchor = false, norm = false, exact_gates = false;
  bool starts = false;  // from a state, sequences at different positions
  std::vector<int64_t> packed = {};
};

void PrintTo(const Problem& p, std::ostream* out) { *out << p.label; }

MemoryConfig lmm(int64_t depth, int64_t chunk, double c = 1) {
  MemoryConfig config;
  config.depth = depth;
  config.hidden = depth > 1 ? 7 : 0;
  config.chunk = chunk;
  config.loss_scale = c;
  return config;
}

MemoryConfig ttt(int64_t depth, int64_t chunk) {
  MemoryConfig config = lmm(depth, chunk);
  config.rule = "ttt";
  config.activation = "gelu";
  config.bias = true;
  return config;
}

std::vector<Problem> problems() {
  std::vector<Problem> all;
  auto add = [&](const char* label, MemoryConfig config) -> Problem& {
    all.push_back({label, std::move(config)});
    return all.back();
  };
  add("lmm_linear_chunk4", lmm(1, 4));
  add("lmm_deep_chunk16", lmm(2, 16, 2)).exact_gates = true;
  add("lmm_depth4_chunk3", lmm(4, 3)).T = 8;
  add("lmm_token_chunks", lmm(2, 1)).T = 9;
  {
    Problem& p = add("lmm_gelu_bias_norm", lmm(3, 5));
    p.config.activation = "gelu";
    p.config.bias = p.norm = true;
    p.starts = true;
  }
  {
    Problem& p = add("lmm_anchor_started", lmm(2, 8));
    p.anchor = p.starts = true;
    p.exact_gates = true;
  }
  {
    Problem& p = add("lmm_anchor_ends_inside", lmm(2, 16));
    p.anchor = p.norm = true;
    p.B = 1;
  }
  {
    Problem& p = add("lmm_no_momentum_packed", lmm(2, 4));
    p.momentum = false;
    p.B = 1;
    p.packed = {0, 6, 6, 7, 21};
    p.starts = true;
  }
  {
    Problem& p = add("lmm_no_forgetting", lmm(1, 6));
    p.forgetting = false;
    p.config.bias = true;
  }
  {
    Problem& p = add("lmm_clip", lmm(2, 4));
    p.config.clip = 0.9;
    p.config.bias = true;
    p.starts = true;
  }
  {
    Problem& p = add("lmm_clip_norm", lmm(1, 4, 2));
    p.config.clip = 0.7;
    p.norm = true;
  }
  {
    Problem& p = add("lmm_read_before", lmm(2, 5));
    p.config.read_before = true;
    p.starts = true;
  }
  for (const bool momentum : {true, false}) {
    Problem& p = add(momentum ? "lmm_sequential" : "lmm_sequential_no_momentum", lmm(1, 1, 2));
    p.config.sequential = true;
    p.exact_gates = p.starts = true;
    p.momentum = momentum;
    p.T = 41;
  }
  {
    Problem& p = add("lmm_sequential_bias_before", lmm(1, 7));
    p.config.sequential = p.config.bias = p.config.read_before = true;
    p.D = 19;
  }
  {
    Problem& p = add("lmm_many_segments", lmm(2, 2));
    p.T = 50;
    p.H = 1;
    p.D = 3;
  }
  {
    Problem& p = add("lmm_wide_chunk40", lmm(2, 40));
    p.T = 50;
    p.D = 17;
    p.config.hidden = 20;
  }
  add("ttt_linear", ttt(1, 4)).norm = true;
  add("ttt_linear_plain", ttt(1, 16)).config.bias = false;
  {
    Problem& p = add("ttt_mlp_started", ttt(2, 8));
    p.norm = p.starts = true;
    p.D = 6;
  }
  {
    Problem& p = add("ttt_mlp_packed", ttt(2, 4));
    p.norm = p.starts = true;
    p.B = 1;
    p.packed = {0, 3, 3, 5, 14, 21};
  }
  {
    Problem& p = add("ttt_short", ttt(1, 16));
    p.norm = p.starts = true;
    p.T = 2;
  }
  return all;
}

class TestTimeMemory : public ::testing::TestWithParam<Problem> {
 protected:
  void SetUp() override {
    torch::manual_seed(3);
    const Problem& p = GetParam();
    N = p.packed.empty() ? p.B : static_cast<int64_t>(p.packed.size()) - 1;
    P = test_time_memory_size(p.D, p.config.depth, p.config.hidden, p.config.bias);
    in.q = normal({p.B, p.T, p.H, p.D}) * 0.5;
    in.k = normal({p.B, p.T, p.H, p.D}) * 0.5;
    in.v = normal({p.B, p.T, p.H, p.D});
    auto gate = [&](double low, double high) {
      return at::rand({p.B, p.T, p.H}, at::kDouble) * (high - low) + low;
    };
    in.rate = gate(0.02, 0.2);
    if (p.config.rule == "ttt") {
      in.tau = 1 / at::arange(1, p.config.chunk + 1, at::kDouble) +
               0.1 * at::rand({p.config.chunk}, at::kDouble);
    } else {
      if (p.momentum) in.eta = gate(0.1, 0.8);
      if (p.forgetting) in.alpha = gate(0.05, 0.5);
    }
    if (p.exact_gates) {
      if (in.eta.defined()) in.eta.select(1, 4).zero_();
      in.alpha.select(1, 6).fill_(1);
      in.alpha.select(1, 9).zero_();
      in.rate.select(1, 2).zero_();
    }
    if (p.anchor) in.anchor = normal({p.H, P}) * 0.3;
    if (p.norm) {
      in.norm_weight = normal({p.H, p.D}) * 0.2 + 1;
      in.norm_bias = normal({p.H, p.D}) * 0.2;
    }
    in.memory = normal({N, p.H, P}) * 0.4;
    if (p.starts) {
      const bool momentum = has_momentum(p.config, p.momentum);
      std::vector<int64_t> positions;
      for (int64_t n = 0; n < N; ++n) positions.push_back(n == 0 ? 3 : n * 7 + 1);
      in.position = at::tensor(positions, at::kLong);
      if (momentum) in.momentum = normal({N, p.H, P}) * 0.1;
      if (has_gradient_at(p.config)) in.gradient_at = in.memory + normal({N, p.H, P}) * 0.1;
      for (int64_t n = 0; n < N; ++n) {
        // At a chunk's start the states of the two rules are bound.
        if (positions[n] % p.config.chunk != 0) continue;
        if (in.gradient_at.defined()) in.gradient_at.select(0, n).copy_(in.memory.select(0, n));
        if (p.config.rule == "ttt") in.momentum.select(0, n).zero_();
      }
    }
    if (!p.packed.empty()) in.cu_seqlens = at::tensor(p.packed, at::kLong);
  }

  std::vector<std::pair<std::string, Tensor*>> differentiable() {
    std::vector<std::pair<std::string, Tensor*>> all = {{"q", &in.q},
                                                        {"k", &in.k},
                                                        {"v", &in.v},
                                                        {"rate", &in.rate},
                                                        {"eta", &in.eta},
                                                        {"alpha", &in.alpha},
                                                        {"tau", &in.tau},
                                                        {"anchor", &in.anchor},
                                                        {"memory", &in.memory},
                                                        {"momentum", &in.momentum},
                                                        {"norm_weight", &in.norm_weight},
                                                        {"norm_bias", &in.norm_bias},
                                                        {"gradient_at", &in.gradient_at}};
    std::erase_if(all, [](const auto& entry) { return !entry.second->defined(); });
    return all;
  }

  static std::vector<Tensor> list(const MemoryResult& r) {
    std::vector<Tensor> all = {r.o, r.memory};
    if (r.momentum.defined()) all.push_back(r.momentum);
    if (r.gradient_at.defined()) all.push_back(r.gradient_at);
    return all;
  }

  MemoryTensors in;
  int64_t N = 0, P = 0;
};

TEST_P(TestTimeMemory, EqualsTheTokenLoopWithAllGradients) {
  const Problem& p = GetParam();
  std::vector<Tensor> leaves;
  for (auto& [name, t] : differentiable()) leaves.push_back(t->requires_grad_());
  const std::vector<Tensor> y = list(test_time_memory(in, p.config, true));
  const std::vector<Tensor> expected = list(naive::test_time_memory(in, p.config));
  ASSERT_EQ(y.size(), expected.size());
  std::vector<Tensor> dy;
  for (size_t i = 0; i < y.size(); ++i) {
    expect_near(y[i], expected[i], 1e-11, "output " + std::to_string(i));
    dy.push_back(normal(y[i].sizes()));
  }
  // Each output alone as well, so that what the others pass on hides nothing.
  for (size_t i = 0; i <= y.size(); ++i) {
    const auto some = [&](const std::vector<Tensor>& list) {
      return i < list.size() ? std::vector<Tensor>{list[i]} : list;
    };
    const auto dx = torch::autograd::grad(some(y), leaves, some(dy), true, false, true);
    const auto dx64 = torch::autograd::grad(some(expected), leaves, some(dy), true, false, true);
    size_t n = 0;
    for (auto& [name, t] : differentiable()) {
      const Tensor zero = at::zeros(t->sizes(), at::kDouble);
      expect_near(dx[n].defined() ? dx[n] : zero, dx64[n].defined() ? dx64[n] : zero, 1e-10,
                  "gradient of " + name + " from output " + std::to_string(i));
      if (i == y.size() && name != "gradient_at" && name != "momentum") {
        EXPECT_GT(dx64[n].abs().max().item<double>(), 1e-6) << name;
      }
      ++n;
    }
  }
}

TEST_P(TestTimeMemory, StepsEqualTheTokenLoop) {
  const Problem& p = GetParam();
  if (!p.packed.empty()) return;
  const c10::NoGradGuard no_grad;
  const MemoryResult expected = naive::test_time_memory(in, p.config);
  MemoryTensors one = in;
  auto pool = [&](const Tensor& from, bool wanted) {  // slot 2n holds sequence n
    if (!wanted) return Tensor();
    Tensor t = normal({2 * p.B, p.H, P});
    for (int64_t n = 0; n < p.B; ++n) {
      if (from.defined()) {
        t.select(0, 2 * n).copy_(from.select(0, n));
      } else {
        t.select(0, 2 * n).zero_();
      }
    }
    return t;
  };
  one.memory = pool(in.memory, true);
  one.momentum = pool(in.momentum, has_momentum(p.config, p.momentum));
  one.gradient_at =
      pool(in.gradient_at.defined() ? in.gradient_at : in.memory, has_gradient_at(p.config));
  const Tensor other = one.memory.select(0, 1).clone();
  one.position = in.position.defined() ? in.position.clone() : at::zeros({p.B}, at::kLong);
  Tensor slots = at::arange(p.B, at::kLong) * 2;
  std::vector<Tensor> outs;
  for (int64_t t = 0; t < p.T; ++t) {
    auto token = [&](const Tensor& x) { return x.defined() ? x.narrow(1, t, 1) : x; };
    one.q = token(in.q);
    one.k = token(in.k);
    one.v = token(in.v);
    one.rate = token(in.rate);
    one.eta = token(in.eta);
    one.alpha = token(in.alpha);
    outs.push_back(test_time_memory_step_(one, p.config, slots));
    one.position.add_(1);
  }
  expect_near(at::cat(outs, 1), expected.o, 1e-11, "o");
  auto same = [&](const Tensor& all, const Tensor& wanted, const char* name) {
    if (wanted.defined()) expect_near(all.index_select(0, slots), wanted, 1e-11, name);
  };
  same(one.memory, expected.memory, "memory");
  same(one.momentum, expected.momentum, "momentum");
  same(one.gradient_at, expected.gradient_at, "gradient_at");
  expect_near(one.memory.select(0, 1), other, 0, "a slot that no sequence uses");
}

INSTANTIATE_TEST_SUITE_P(Problems, TestTimeMemory, ::testing::ValuesIn(problems()),
                         [](const auto& info) { return info.param.label; });

TEST(TestTimeMemoryOps, TttBeginsAMiniBatchWithoutASum) {
  for (const int64_t T : {2, 6}) {  // whatever the state holds
    torch::manual_seed(6);
    const MemoryConfig config = ttt(1, 4);
    MemoryTensors in;
    in.q = normal({1, T, 1, 5});
    in.k = normal({1, T, 1, 5});
    in.v = normal({1, T, 1, 5});
    in.rate = at::rand({1, T, 1}, at::kDouble) * 0.1;
    in.tau = 1 / at::arange(1, 5, at::kDouble);
    in.memory = normal({1, 1, 30});
    in.position = at::tensor({int64_t{8}}, at::kLong);
    const std::vector<Tensor> expected = {test_time_memory(in, config, true).o,
                                          test_time_memory(in, config, true).momentum};
    in.momentum = normal({1, 1, 30}).requires_grad_();
    const MemoryResult y = test_time_memory(in, config, true);
    expect_near(y.o, expected[0], 0, "o");
    expect_near(y.momentum, expected[1], 0, "momentum");
    const auto d =
        torch::autograd::grad({y.o.sum(), y.momentum.sum()}, {in.momentum}, {}, {}, false,
                              /*allow_unused=*/true);
    if (d[0].defined()) {
      EXPECT_EQ(d[0].abs().max().item<double>(), 0);
    }
  }
}

TEST(TestTimeMemoryOps, SinglePrecisionAndHalvesStayNear) {
  torch::manual_seed(5);
  MemoryTensors in;
  in.q = normal({2, 70, 2, 8}) * 0.4;
  in.k = normal({2, 70, 2, 8}) * 0.4;
  in.v = normal({2, 70, 2, 8});
  in.rate = at::rand({2, 70, 2}, at::kDouble) * 0.1;
  in.eta = at::rand({2, 70, 2}, at::kDouble) * 0.7;
  in.alpha = at::rand({2, 70, 2}, at::kDouble) * 0.1;
  const MemoryConfig config = lmm(2, 16);
  in.memory = normal({2, 2, test_time_memory_size(8, 2, 7, false)}) * 0.3;
  const Tensor expected = test_time_memory(in, config, false).o;
  for (const auto& [dtype, tolerance] : {std::pair(at::kFloat, 1e-5), {at::kBFloat16, 2e-2}}) {
    MemoryTensors x = in;
    for (Tensor* t : {&x.q, &x.k, &x.v}) *t = t->to(dtype);
    for (Tensor* t : {&x.rate, &x.eta, &x.alpha, &x.memory}) *t = t->to(at::kFloat);
    const MemoryResult y = test_time_memory(x, config, true);
    EXPECT_EQ(y.o.scalar_type(), dtype);
    EXPECT_EQ(y.memory.scalar_type(), at::kFloat);
    expect_near(y.o, expected, tolerance, "o");
  }
}

TEST(TestTimeMemoryOps, RejectsMisuse) {
  MemoryTensors in;
  in.q = in.k = in.v = normal({1, 3, 2, 4});
  in.rate = at::rand({1, 3, 2}, at::kDouble);
  in.memory = normal({1, 2, 16});
  const MemoryConfig config = lmm(1, 4);
  auto error = [&](MemoryTensors t, const MemoryConfig& c) {
    return error_of([&] { test_time_memory(t, c, false); });
  };
  EXPECT_EQ(error(in, config), "no error");
  MemoryTensors bad = in;
  bad.rate = at::rand({1, 3}, at::kDouble);
  EXPECT_THAT(error(bad, config), HasSubstr("[test_time_memory] rate must be [B,T,H] = [1, 3, 2]"));
  bad = in;
  bad.memory = normal({1, 2, 15});
  EXPECT_THAT(error(bad, config), HasSubstr("memory must be [N,H,P] = [1, 2, 16], got [1, 2, 15]"));
  bad = in;
  bad.momentum = in.memory;
  EXPECT_THAT(error(bad, config), HasSubstr("momentum needs eta"));
  MemoryConfig wrong = config;
  wrong.rule = "ttt";
  EXPECT_THAT(error(in, wrong), HasSubstr("the rule ttt takes tau"));
  wrong = config;
  wrong.sequential = true;
  wrong.clip = 1;
  EXPECT_THAT(error(in, wrong), HasSubstr("sequential is for depth 1 without norm, clip"));
  wrong = config;
  wrong.activation = "relu";
  EXPECT_THAT(error(in, wrong), HasSubstr("activation must be silu or gelu, got relu"));
}

}  // namespace
}  // namespace gdn::ops
