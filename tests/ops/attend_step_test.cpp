// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/attend_step.h"

#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "gdn/base/check.h"

namespace gdn {
namespace {

constexpr double kScale = 0.3;

at::Tensor torchs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                          {}, 0.0, false, kScale, /*enable_gqa=*/true)
      .transpose(1, 2);
}

TEST(AttendStepOp, EqualsTorchOnSlicesOfACache) {
  const c10::NoGradGuard no_grad;
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor q = at::randn({2, 1, 6, 20}, options);
  const at::Tensor cache = at::randn({3, 400, 2, 36}, options);  // more sequences and tokens
  const at::Tensor seen = cache.narrow(0, 1, 2).narrow(1, 0, 300);
  const at::Tensor k = seen.narrow(3, 0, 20), v = seen.narrow(3, 20, 16);
  EXPECT_TRUE(torchs(q, k, v).allclose(ops::attend_step(q, k, v, kScale), 1e-12, 1e-12));
  // One head of keys for all, as the latents of MLA.
  const at::Tensor latent = seen.narrow(2, 0, 1), part = latent.narrow(3, 0, 16);
  const at::Tensor wide = at::randn({2, 1, 4, 36}, options);
  EXPECT_TRUE(torchs(wide, latent, part)
                  .allclose(ops::attend_step(wide, latent, part, kScale), 1e-12, 1e-12));
}

TEST(AttendStepOp, LeavesGradientsToTorch) {
  const at::Tensor q = at::randn({1, 1, 2, 4}), k = at::randn({1, 5, 2, 4});
  EXPECT_TRUE(ops::can_attend_step(q, k, k));
  EXPECT_FALSE(ops::can_attend_step(k, k, k)) << "five queries";
  const at::Tensor wanted = at::randn({1, 5, 2, 4}).requires_grad_(true);
  EXPECT_FALSE(ops::can_attend_step(q, wanted, k));
  const c10::NoGradGuard no_grad;
  EXPECT_TRUE(ops::can_attend_step(q, wanted, k));
}

TEST(AttendStepOp, RefusesWrongShapesAndDtypes) {
  const at::Tensor q = at::randn({1, 1, 2, 4}), k = at::randn({1, 5, 2, 4});
  EXPECT_THROW(ops::attend_step(q, k, at::randn({1, 6, 2, 4}), 1), Error);
  EXPECT_THROW(ops::attend_step(at::randn({1, 2, 2, 4}), k, k, 1), Error);
  EXPECT_THROW(ops::attend_step(q, k.to(at::kDouble), k, 1), Error);
}

}  // namespace
}  // namespace gdn
