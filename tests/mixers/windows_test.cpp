// SPDX-License-Identifier: Apache-2.0
// Attention within a window over several blocks of queries, which the contract's short sequences
// never reach.
#include "gdn/mixers/common/windows.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <tuple>

#include "gdn/base/check.h"
#include "gdn/mixers/attention/core.h"

namespace gdn {
namespace {

at::Tensor random(at::IntArrayRef sizes) {
  return at::randn(sizes, at::TensorOptions().dtype(at::kDouble)).requires_grad_(true);
}

TEST(Windows, BlocksSeeWhatTheDefinitionSees) {
  // T queries at the end of S keys: one block and several, with too few keys before the first and
  // with more than the window.
  for (const auto& [T, S, window] : {std::tuple<int64_t, int64_t, int64_t>{40, 40, 7},
                                     {200, 200, 5},
                                     {200, 203, 70},
                                     {150, 400, 64},
                                     {65, 300, 1},
                                     {1, 90, 20}}) {
    const std::string where = str_cat("T ", T, " S ", S, " window ", window);
    const at::Tensor q = random({2, T, 4, 6}), k = random({2, S, 2, 6}), v = random({2, S, 2, 3});
    const at::Tensor dy = random({2, T, 4, 3}).detach();
    const at::Tensor fast = softmax_attention(q, k, v, window, /*naive=*/false);
    const at::Tensor slow = softmax_attention(q, k, v, window, /*naive=*/true);
    EXPECT_LT((fast - slow).abs().max().item<double>(), 1e-12) << where;
    const auto gradients = [&](const at::Tensor& y) {
      return torch::autograd::grad({y}, {q, k, v}, {dy});
    };
    const auto a = gradients(fast), b = gradients(slow);
    for (size_t i = 0; i < a.size(); ++i)
      EXPECT_LT((a[i] - b[i]).abs().max().item<double>(), 1e-12) << where << " input " << i;
  }
}

TEST(Windows, KeysOfABlockEndWithIt) {
  const at::Tensor x = at::arange(300, at::kLong).view({1, 300, 1});
  const std::vector<at::Tensor> keys = key_blocks(x, /*T=*/250, /*window=*/100);
  ASSERT_EQ(keys.size(), 3u);  // of 100, 100 and 50 queries, from token 50 on
  EXPECT_EQ(keys[0].size(1), 150);
  EXPECT_EQ(keys[1].size(1), 199);
  EXPECT_EQ(keys[1][0][0].item<int64_t>(), 51);
  EXPECT_EQ(keys[2][0][-1].item<int64_t>(), 299);
}

}  // namespace
}  // namespace gdn
