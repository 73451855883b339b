// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/gate.h"

#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>

#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using testing::error_of;
using ::testing::HasSubstr;
using testing::normal;
using Tensors = std::vector<Tensor>;

TEST(GateOps, EqualCompositionsInEveryDtype) {
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{gdn_gate(t[0], t[1], t[2])}; },
        [](const Tensors& t) { return Tensors{-t[1].exp() * at::softplus(t[0] + t[2])}; },
        {normal({2, 9, 5}) * 4, normal({5}), normal({5})}, dtype, "gdn_gate");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{kda_gate(t[0], t[1], t[2])}; },
        [](const Tensors& t) {
          const Tensor x = t[0] + t[2].view({3, 6});
          return Tensors{-t[1].exp().unsqueeze(-1) * at::softplus(x)};
        },
        {normal({2, 4, 3, 6}), normal({3}), normal({18})}, dtype, "kda_gate");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{kda_gate(t[0], t[1], {}, -5.0)}; },
        [](const Tensors& t) { return Tensors{-5 * at::sigmoid(t[1].exp().unsqueeze(-1) * t[0])}; },
        {normal({2, 4, 3, 6}), normal({3}) * 0.3}, dtype, "safe kda_gate");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{beta_sigmoid(t[0], true)}; },
        [](const Tensors& t) { return Tensors{2 * at::sigmoid(t[0])}; }, {normal({2, 9, 5})}, dtype,
        "beta_sigmoid");
  }
}

TEST(GateOps, ResultsAreInTheAccumulationTypeAndSlicesNeedNoCopy) {
  const Tensor wide = normal({2, 7, 30}, at::kBFloat16), A_log = normal({3}, at::kFloat);
  const Tensor a = wide.slice(-1, 2, 14).unflatten(-1, {3, 4});
  const Tensor g = kda_gate(a, A_log);
  EXPECT_EQ(g.scalar_type(), at::kFloat);
  EXPECT_TRUE(g.equal(kda_gate(a.contiguous(), A_log)));
  EXPECT_TRUE(kda_gate(a.transpose(0, 1), A_log).equal(g.transpose(0, 1)));
  const Tensor heads = wide.slice(-1, 1, 4);
  EXPECT_TRUE(gdn_gate(heads, A_log).equal(gdn_gate(heads.contiguous(), A_log)));
  EXPECT_TRUE(beta_sigmoid(heads).equal(at::sigmoid(heads.to(at::kFloat))) ||
              at::allclose(beta_sigmoid(heads), at::sigmoid(heads.to(at::kFloat)), 1e-6));
  EXPECT_EQ(beta_sigmoid(heads.to(at::kDouble)).scalar_type(), at::kDouble);
  EXPECT_EQ(beta_sigmoid(at::randn({})).dim(), 0);
}

TEST(GateOps, ErrorsNameOpRuleAndValue) {
  const Tensor a = normal({2, 3, 4}, at::kFloat), A_log = normal({4}, at::kFloat);
  EXPECT_EQ(error_of([&] { gdn_gate(a, normal({3}, at::kFloat)); }),
            "[gdn_gate] A_log must be [HV] = [4], got [3]");
  EXPECT_EQ(error_of([&] { gdn_gate(a, A_log, normal({3}, at::kFloat)); }),
            "[gdn_gate] dt_bias must be [HV] = [4], got [3]");
  EXPECT_EQ(error_of([&] { kda_gate(A_log, A_log); }),
            "[kda_gate] a must be [..., HV, K], got [4]");
  EXPECT_THAT(error_of([&] { kda_gate(a, A_log.slice(0, 0, 3), {}, 0.5); }),
              HasSubstr("negative, got 0.5"));
  EXPECT_THAT(error_of([&] { beta_sigmoid(a.to(at::kInt)); }),
              HasSubstr("[beta_sigmoid] b must be float32"));
}

}  // namespace
}  // namespace gdn::ops
