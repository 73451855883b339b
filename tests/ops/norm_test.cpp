// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/norm.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using testing::error_of;
using ::testing::HasSubstr;
using testing::normal;
using Tensors = std::vector<Tensor>;

Tensor rms(const Tensor& x, double eps) { return x * (x.square().mean(-1, true) + eps).rsqrt(); }

TEST(NormOps, EqualCompositionsInEveryDtype) {
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{l2norm(t[0])}; },
        [](const Tensors& t) {
          return Tensors{t[0] * (t[0].square().sum(-1, true) + 1e-6).rsqrt()};
        },
        {normal({2, 3, 4, 20})}, dtype, "l2norm");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{rms_norm(t[0], t[1], 1e-3)}; },
        [](const Tensors& t) { return Tensors{rms(t[0], 1e-3) * t[1]}; },
        {normal({5, 33}), normal({33})}, dtype, "rms_norm");
    testing::expect_same_function(
        [](const Tensors& t) {
          auto [sum, norm] = add_rms_norm(t[0], t[1], t[2], 0.5, 1e-3);
          return Tensors{sum, norm};
        },
        [](const Tensors& t) {
          const Tensor sum = t[0] + 0.5 * t[1];
          return Tensors{sum, rms(sum, 1e-3) * t[2]};
        },
        {normal({5, 33}), normal({5, 33}), normal({33})}, dtype, "add_rms_norm");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{std::get<1>(add_rms_norm(t[0], t[1], t[2]))}; },
        [](const Tensors& t) { return Tensors{rms(t[0] + t[1], 1e-5) * t[2]}; },
        {normal({6, 16}), normal({6, 16}), normal({16})}, dtype, "add_rms_norm, the norm alone");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{rms_norm_gated(t[0], t[1], t[2])}; },
        [](const Tensors& t) { return Tensors{rms(t[0], 1e-5) * t[1] * at::silu(t[2])}; },
        {normal({2, 3, 4, 16}), normal({16}), normal({2, 3, 4, 16})}, dtype, "rms_norm_gated silu");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{rms_norm_gated(t[0], t[1], t[2], 1e-5, "sigmoid")}; },
        [](const Tensors& t) { return Tensors{rms(t[0], 1e-5) * t[1] * at::sigmoid(t[2])}; },
        {normal({7, 9}), normal({9}), normal({7, 9})}, dtype, "rms_norm_gated sigmoid");
  }
}

TEST(NormOps, SlicesAndMasterWeightsGiveTheSameAsCopies) {
  const Tensor wide = normal({2, 3, 60}, at::kBFloat16), weight = normal({8}, at::kFloat);
  const Tensor x = wide.slice(-1, 4, 20).unflatten(-1, {2, 8}),
               gate = wide.slice(-1, 30, 46).unflatten(-1, {2, 8});
  const Tensor y = rms_norm_gated(x, weight, gate);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(y.equal(rms_norm_gated(x.contiguous(), weight, gate.contiguous())));
  EXPECT_TRUE(l2norm(x.transpose(1, 2)).equal(l2norm(x).transpose(1, 2)));
  const Tensor w = weight.clone().requires_grad_();
  rms_norm(x, w).sum().backward();
  EXPECT_EQ(w.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(l2norm(at::ones({0, 3})).sizes(), at::IntArrayRef({0, 3}));
}

TEST(NormOps, TheFusedSumHasTheBitsOfASumAndANorm) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Tensor x = normal({4, 3, 40}, dtype), y = normal({4, 3, 80}, dtype).slice(-1, 7, 47);
    const Tensor weight = normal({40}, at::kFloat);
    const auto [sum, norm] = add_rms_norm(x, y, weight);
    EXPECT_TRUE(sum.equal(x + y));
    EXPECT_TRUE(norm.equal(rms_norm(sum, weight)));
  }
  EXPECT_EQ(error_of([] {
              add_rms_norm(at::ones({2, 4}), at::ones({3, 4}), at::ones({4}));
            }),
            "[add_rms_norm] y must be of the shape of x = [2, 4], got [3, 4]");
}

TEST(NormOps, ErrorsNameOpRuleAndValue) {
  const Tensor x = normal({2, 4}, at::kFloat);
  EXPECT_EQ(error_of([&] { rms_norm(x, normal({3}, at::kFloat)); }),
            "[rms_norm] weight must be [D] = [4], got [3]");
  EXPECT_EQ(error_of([&] { l2norm(x.to(at::kLong)); }),
            "[l2norm] x must be float32, float64, bfloat16 or float16, got Long");
  EXPECT_EQ(error_of([&] { l2norm(x, -1.0); }), "[l2norm] eps must not be negative, got -1");
  EXPECT_THAT(error_of([&] { rms_norm_gated(x, x[0], x.slice(0, 0, 1)); }),
              HasSubstr("[2, 4], got [1, 4]"));
  EXPECT_THAT(error_of([&] { rms_norm_gated(x, x[0], x.to(at::kHalf)); }),
              HasSubstr("gate must have the dtype of x (Float), got Half"));
  EXPECT_THAT(error_of([&] { rms_norm_gated(x, x[0], x, 1e-5, "relu"); }), HasSubstr("got 'relu'"));
}

}  // namespace
}  // namespace gdn::ops
