// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/short_conv.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/full.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::nullopt;
using testing::error_of;
using ::testing::HasSubstr;
using testing::normal;
using Tensors = std::vector<Tensor>;

// torch's own convolution of [B,T,C] after a history [B,C,W]; returns y and the new history.
Tensors composition(const Tensor& x, const Tensor& weight, const Tensor& bias,
                    const Tensor& history, bool silu) {
  const int64_t width = weight.size(1), length = x.size(1);
  const Tensor all = at::cat({history, x.transpose(1, 2)}, -1);  // [B, C, W + T]
  const std::vector<int64_t> one{1}, zero{0};
  const Tensor y = at::conv1d(all, weight.unsqueeze(1), bias, at::IntArrayRef(one),
                              at::IntArrayRef(zero), at::IntArrayRef(one), x.size(2))
                       .slice(-1, 1)
                       .transpose(1, 2);
  return {silu ? at::silu(y) : y, all.slice(-1, length, length + width)};
}

TEST(ShortConvOps, EqualsTorchsConvolutionInEveryDtype) {
  for (const at::ScalarType dtype : testing::kDtypes) {
    testing::expect_same_function(
        [](const Tensors& t) {
          auto [y, final_state] = causal_conv1d(t[0], t[1], t[2], t[3], nullopt, true, "silu");
          return Tensors{y, final_state};
        },
        [](const Tensors& t) { return composition(t[0], t[1], t[2], t[3], true); },
        {normal({2, 19, 6}), normal({6, 4}), normal({6}), normal({2, 6, 4})}, dtype,
        "with everything");
    testing::expect_same_function(
        [](const Tensors& t) { return Tensors{std::get<0>(causal_conv1d(t[0], t[1]))}; },
        [](const Tensors& t) {
          const Tensor none = at::zeros({3, 5, 3}, t[0].options());
          return Tensors{composition(t[0], t[1], at::zeros({5}, t[0].options()), none, false)[0]};
        },
        {normal({3, 7, 5}), normal({5, 3})}, dtype, "plain");
  }
}

TEST(ShortConvOps, PackedSequencesAreIndependent) {
  const Tensor x = normal({1, 12, 8}, at::kFloat), weight = normal({8, 4}, at::kFloat);
  const Tensor initial = normal({3, 8, 4}, at::kFloat), cu = at::tensor({0, 2, 2, 12}, at::kInt);
  auto [y, final_state] = causal_conv1d(x, weight, nullopt, initial, cu, true, "swish");
  for (int64_t n = 0; n < 3; ++n) {
    const int64_t begin = cu[n].item<int64_t>(), end = cu[n + 1].item<int64_t>();
    auto [y_n, final_n] = causal_conv1d(x.slice(1, begin, end), weight, nullopt,
                                        initial.slice(0, n, n + 1), nullopt, true, "silu");
    EXPECT_TRUE(y.slice(1, begin, end).equal(y_n)) << n;
    EXPECT_TRUE(final_state[n].equal(final_n[0])) << n;
  }
  EXPECT_TRUE(final_state[1].equal(initial[1]));
  EXPECT_EQ(std::get<1>(causal_conv1d(x, weight)).numel(), 0);
}

TEST(ShortConvOps, OneConvolutionOverSlicesEqualsSeparateOnes) {
  const Tensor wide = normal({2, 9, 20}, at::kBFloat16), weight = normal({20, 4}, at::kFloat);
  const Tensor whole =
      std::get<0>(causal_conv1d(wide, weight, nullopt, nullopt, nullopt, false, "silu"));
  const Tensor part = std::get<0>(causal_conv1d(wide.slice(-1, 5, 13), weight.slice(0, 5, 13),
                                                nullopt, nullopt, nullopt, false, "silu"));
  EXPECT_TRUE(whole.slice(-1, 5, 13).equal(part));
  EXPECT_EQ(part.scalar_type(), at::kBFloat16);
}

TEST(ShortConvOps, UpdateContinuesAPrefillInItsSlot) {
  const Tensor x = normal({1, 6, 32}, at::kFloat), weight = normal({32, 4}, at::kFloat);
  const Tensor bias = normal({32}, at::kFloat);
  auto [y, final_state] = causal_conv1d(x, weight, bias, nullopt, nullopt, true, "silu");
  Tensor pool = at::full({3, 32, 4}, 7.0f, at::kFloat);
  pool.select(0, 1).copy_(
      std::get<1>(causal_conv1d(x.slice(1, 0, 5), weight, bias, nullopt, nullopt, true))[0]);
  const Tensor before = pool.clone();
  const Tensor last = at::cat({x.select(1, 5), x.select(1, 5)});
  const auto version = pool._version();
  const Tensor out =
      causal_conv1d_update_(last, pool, weight, bias, at::tensor({1, -1}, at::kInt), "silu");
  EXPECT_GT(pool._version(), version);
  EXPECT_TRUE(out[0].equal(y[0][5]));
  EXPECT_TRUE(out[1].equal(at::zeros({32})));
  EXPECT_TRUE(pool[1].equal(final_state[0]));
  EXPECT_TRUE(pool[0].equal(before[0]));
  EXPECT_TRUE(pool[2].equal(before[2]));
  Tensor two = before.slice(0, 0, 2).contiguous();
  EXPECT_EQ(causal_conv1d_update_(last.unsqueeze(1), two, weight).sizes(),
            at::IntArrayRef({2, 1, 32}));
}

TEST(ShortConvOps, ErrorsNameOpRuleAndValue) {
  const Tensor x = normal({2, 5, 8}, at::kFloat), weight = normal({8, 4}, at::kFloat);
  auto conv = [&](const Tensor& x, const Tensor& w, const std::optional<Tensor>& initial,
                  const std::optional<Tensor>& cu, const char* activation) {
    return error_of([&] { causal_conv1d(x, w, nullopt, initial, cu, false, activation); });
  };
  EXPECT_EQ(conv(x[0], weight, nullopt, nullopt, "silu"),
            "[causal_conv1d] x must be [B,T,C], got [5, 8]");
  EXPECT_EQ(conv(x, normal({7, 4}), nullopt, nullopt, "silu"),
            "[causal_conv1d] weight must be [C,W] = [8, 4], got [7, 4]");
  EXPECT_THAT(conv(x, normal({8, 9}), nullopt, nullopt, "silu"),
              HasSubstr("must be 1 to 8, got [8, 9]"));
  EXPECT_THAT(conv(x, weight, normal({1, 8, 4}), nullopt, "silu"),
              HasSubstr("[N,C,W] = [2, 8, 4], got [1, 8, 4]"));
  EXPECT_THAT(conv(x, weight, normal({2, 8, 4}), nullopt, "silu"),
              HasSubstr("dtype of x (Float), got Double"));
  EXPECT_THAT(conv(x, weight, nullopt, at::tensor({0, 10}), "silu"),
              HasSubstr("batch size of x must be 1, got 2"));
  EXPECT_THAT(conv(x, weight, nullopt, nullopt, "gelu"), HasSubstr("'swish', got 'gelu'"));
  Tensor pool = at::zeros({2, 8, 4}), transposed = at::zeros({2, 4, 8}).transpose(1, 2);
  const Tensor token = x.select(1, 0);
  EXPECT_THAT(error_of([&] { causal_conv1d_update_(x, pool, weight); }),
              HasSubstr("or [N,1,C], got [2, 5, 8]"));
  EXPECT_THAT(error_of([&] { causal_conv1d_update_(token, transposed, weight); }),
              HasSubstr("must be contiguous"));
  EXPECT_THAT(error_of([&] {
                causal_conv1d_update_(token, pool, weight, nullopt, at::tensor({0, 2}));
              }),
              HasSubstr("below the number of slots, 2, got 2"));
  const Tensor trained = weight.clone().requires_grad_();
  EXPECT_THAT(error_of([&] { causal_conv1d_update_(token, pool, trained); }),
              HasSubstr("under torch.no_grad()"));
}

}  // namespace
}  // namespace gdn::ops
