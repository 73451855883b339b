// SPDX-License-Identifier: Apache-2.0
// What only C++ can see of the delta rule's ops; values, gradients and errors are tested from
// Python.
#include "gdn/ops/delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "gdn/ops/norm.h"

namespace gdn::ops {
namespace {

struct Inputs {
  at::Tensor q = at::randn({2, 40, 2, 8}), k = l2norm(at::randn({2, 40, 2, 8})),
             v = at::randn({2, 40, 4, 6}), g = -at::rand({2, 40, 4}), beta = at::rand({2, 40, 4});

  std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const char* form, bool save = false,
                                                     bool final_state = true) const {
    return delta_rule(q, k, v, g, beta, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                      std::nullopt, final_state, "key", form, 0, save);
  }
};

TEST(DeltaRuleOp, SavesOnlyWhatIsAskedFor) {
  Inputs x;
  EXPECT_EQ(std::get<2>(x.run("chunk")).numel(), 0);
  EXPECT_GT(std::get<2>(x.run("chunk", /*save=*/true)).numel(), 0);
  EXPECT_EQ(std::get<1>(x.run("chunk", false, /*final_state=*/false)).numel(), 0);
  x.q.requires_grad_();
  const auto o = std::get<0>(x.run("chunk"));
  ASSERT_TRUE(o.requires_grad());
  EXPECT_TRUE(o.grad_fn() != nullptr);
  c10::NoGradGuard no_grad;
  EXPECT_FALSE(std::get<0>(x.run("chunk")).requires_grad());
}

TEST(DeltaRuleOp, FormsAgree) {
  const Inputs x;
  const auto [o, s, unused] = x.run("naive");
  for (const char* form : {"chunk", "recurrent"}) {
    const auto [other_o, other_s, none] = x.run(form);
    EXPECT_LT((other_o - o).abs().max().item<float>(), 2e-5f) << form;
    EXPECT_LT((other_s - s).abs().max().item<float>(), 2e-5f) << form;
  }
}

TEST(DeltaRuleOp, StepLeavesTheStateOfTheWholeSequence) {
  const Inputs x;
  const auto [o, s, unused] = x.run("naive");
  at::Tensor pool = at::zeros({2, 4, 8, 6});
  for (int64_t t = 0; t < 40; ++t) {
    const at::Tensor y = delta_rule_step_(x.q.select(1, t), x.k.select(1, t), x.v.select(1, t),
                                          x.g.select(1, t), x.beta.select(1, t), std::nullopt,
                                          std::nullopt, pool, std::nullopt, std::nullopt, "key");
    EXPECT_LT((y - o.select(1, t)).abs().max().item<float>(), 2e-5f) << t;
  }
  EXPECT_LT((pool - s).abs().max().item<float>(), 2e-5f);
}

TEST(DeltaRuleOp, EmptySequencesKeepTheirState) {
  const at::Tensor initial = at::randn({3, 2, 4, 5});
  const at::Tensor q = at::empty({3, 0, 1, 4}), v = at::empty({3, 0, 2, 5});
  for (const char* form : {"chunk", "recurrent", "naive"}) {
    const auto [o, s, saved] =
        delta_rule(q, q, v, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                   initial, std::nullopt, true, "key", form, 0, false);
    EXPECT_EQ(o.sizes(), v.sizes()) << form;
    EXPECT_TRUE(s.equal(initial)) << form;
  }
}

}  // namespace
}  // namespace gdn::ops
