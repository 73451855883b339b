// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>

#include "gdn/ops/rope.h"
#include "gdn/ops/swiglu.h"
#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using testing::error_of;
using ::testing::HasSubstr;
using testing::normal;
using Tensors = std::vector<Tensor>;

TEST(SwigluOps, EqualsTheCompositionInEveryDtype) {
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function([](const Tensors& t) { return Tensors{swiglu(t[0], t[1])}; },
                                  [](const Tensors& t) { return Tensors{at::silu(t[0]) * t[1]}; },
                                  {normal({2, 3, 21}), normal({2, 3, 21})}, dtype, "swiglu");
  }
  const Tensor wide = normal({2, 5, 16}, at::kHalf);
  const Tensor gate = wide.slice(-1, 0, 8), up = wide.slice(-1, 8);
  EXPECT_TRUE(swiglu(gate, up).equal(swiglu(gate.contiguous(), up.contiguous())));
}

TEST(SwigluOps, ErrorsNameOpRuleAndValue) {
  const Tensor x = normal({2, 4}, at::kFloat);
  EXPECT_EQ(error_of([&] { swiglu(x, x[0]); }),
            "[swiglu] up must be of the shape of gate = [2, 4], got [4]");
  EXPECT_THAT(error_of([&] { swiglu(x, x.to(at::kDouble)); }),
              HasSubstr("dtype of gate (Float), got Double"));
}

Tensor rotary_composition(const Tensor& x, const Tensor& positions, double theta,
                          int64_t rotary_dim) {
  const Tensor exponents = at::arange(0, rotary_dim, 2, at::kDouble) / rotary_dim;
  const Tensor angle =
      (positions.to(at::kDouble).unsqueeze(-1) * at::pow(theta, -exponents)).unsqueeze(-2);
  const int64_t half = rotary_dim / 2;
  const Tensor a = x.slice(-1, 0, half), b = x.slice(-1, half, rotary_dim);
  return at::cat({a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(),
                  x.slice(-1, rotary_dim)},
                 -1);
}

TEST(RotaryOps, EqualsTheCompositionInEveryDtype) {
  const Tensor each = at::tensor({0, 1, 2, 5, 900, 40}, at::kLong).view({2, 3}),
               shared = at::arange(3, at::kLong);
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function(
        [&](const Tensors& t) { return Tensors{rotary(t[0], each)}; },
        [&](const Tensors& t) { return Tensors{rotary_composition(t[0], each, 1e4, 16)}; },
        {normal({2, 3, 4, 16})}, dtype, "rotary");
    testing::expect_same_function(
        [&](const Tensors& t) { return Tensors{rotary(t[0], shared, 1e6, 6)}; },
        [&](const Tensors& t) { return Tensors{rotary_composition(t[0], shared, 1e6, 6)}; },
        {normal({2, 3, 4, 16})}, dtype, "partial rotary");
  }
  const Tensor wide = normal({2, 3, 50}, at::kFloat);
  const Tensor heads = wide.slice(-1, 2, 34).unflatten(-1, {4, 8});
  EXPECT_TRUE(rotary(heads, shared).equal(rotary(heads.contiguous(), shared)));
}

TEST(RotaryOps, ErrorsNameOpRuleAndValue) {
  const Tensor x = normal({2, 3, 4, 8}, at::kFloat), positions = at::arange(3, at::kLong);
  EXPECT_EQ(error_of([&] { rotary(x[0], positions); }),
            "[rotary] x must be [B,T,H,D], got [3, 4, 8]");
  EXPECT_EQ(error_of([&] { rotary(x, at::arange(4, at::kLong)); }),
            "[rotary] positions must be [T] = [3] or [B,T] = [2, 3], got [4]");
  EXPECT_THAT(error_of([&] { rotary(x, positions.to(at::kInt)); }), HasSubstr("int64, got Int"));
  EXPECT_THAT(error_of([&] { rotary(x, positions, 1e4, 5); }),
              HasSubstr("even and at most D, 8, got 5"));
  EXPECT_THAT(error_of([&] { rotary(x, positions, -1); }),
              HasSubstr("theta must be positive, got -1"));
}

}  // namespace
}  // namespace gdn::ops
