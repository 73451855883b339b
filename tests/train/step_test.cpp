// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/step.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "gdn/train/optimizer.h"

namespace gdn {
namespace {

using ::testing::HasSubstr;

class Step : public ::testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(3);
    ModelConfig config;
    config.vocab_size = 11;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    BlockConfig block;
    block.mixer_options = {{"num_heads", 2}, {"head_dim", 8}, {"expand_v", 1.0}};
    config.blocks = {block, block};
    model_ = std::make_shared<CausalLM>(config);
    parameters_ = parameters_of(*model_);
  }

  static Batch batch(int64_t rows, int64_t first, bool masked) {
    Batch b;
    b.B = rows;
    b.T = 9;
    for (int64_t i = 0; i < b.B * b.T; ++i) {
      b.ids.push_back((first + i * i) % 11);
      b.targets.push_back(masked && i % 3 ? -100 : (first + 2 * i) % 11);
    }
    return b;
  }

  std::vector<at::Tensor> take_gradients() {
    std::vector<at::Tensor> out;
    for (auto& [name, p] : parameters_) {
      out.push_back(p.grad().clone());
      p.mutable_grad().reset();
    }
    return out;
  }

  std::shared_ptr<CausalLM> model_;
  NamedTensors parameters_;
};

// Decoding in bf16 keeps cast weights; an optimizer's step must not leave it with the old ones.
TEST_F(Step, DecodingSeesWhatTheOptimizerChanged) {
  model_->set_compute_dtype(at::kBFloat16);
  const auto logits = [&] {
    const c10::NoGradGuard no_grad;
    return model_->logits(model_->hidden(at::full({1, 1}, 3, at::kLong)));
  };
  AdamW optimizer(parameters_, {});
  at::Tensor before = logits();
  for (const bool decode_before_the_step : {false, true}) {
    accumulate_gradients(*model_, {to_tensors(batch(2, 1, false))});
    if (decode_before_the_step) {
      EXPECT_TRUE(at::equal(logits(), before));
    }
    optimizer.step(0.05, 0);
    optimizer.zero_grad();
    const at::Tensor after = logits();
    EXPECT_FALSE(at::allclose(after, before, 1e-2, 1e-2));
    for (auto& [name, p] : parameters_) {
      const c10::NoGradGuard no_grad;
      p.mul_(1);  // counts the version up, so that every cast is made anew
    }
    EXPECT_TRUE(at::equal(after, logits()));
    before = after;
  }
}

// Batches of different sizes and with different numbers of targets must count by their targets.
TEST_F(Step, AccumulatingEqualsOneLargeBatch) {
  const Batch a = batch(2, 1, true), b = batch(1, 5, false);
  Batch both = a;
  both.B = 3;
  both.ids.insert(both.ids.end(), b.ids.begin(), b.ids.end());
  both.targets.insert(both.targets.end(), b.targets.begin(), b.targets.end());
  Batch silent = b;
  for (int64_t& target : silent.targets) target = -100;

  const double whole = accumulate_gradients(*model_, {to_tensors(both)});
  const auto expected = take_gradients();
  const double parts =
      accumulate_gradients(*model_, {to_tensors(a), to_tensors(silent), to_tensors(b)});
  const auto got = take_gradients();
  EXPECT_NEAR(parts, whole, 1e-6);
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_TRUE(at::allclose(got[i], expected[i], 1e-4, 1e-7)) << parameters_[i].first;
  EXPECT_THROW(accumulate_gradients(*model_, {to_tensors(silent)}), std::exception);
}

TEST_F(Step, PackedBatchesKeepTheirCuts) {
  Batch packed = batch(1, 2, false);
  packed.cu_seqlens = {0, 4, 9};
  const TensorBatch t = to_tensors(packed);
  EXPECT_EQ(t.cu_seqlens.numel(), 3);
  EXPECT_EQ(t.scored, 9);
  const double cut = accumulate_gradients(*model_, {t});
  packed.cu_seqlens.clear();
  EXPECT_NE(cut, accumulate_gradients(*model_, {to_tensors(packed)}));
}

TEST_F(Step, NamesTheFirstBadTensor) {
  const std::vector<TensorBatch> batches = {to_tensors(batch(2, 1, false))};
  accumulate_gradients(*model_, batches);
  EXPECT_EQ(first_bad_tensor(*model_, parameters_, batches), "");

  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  const auto find = [&](const std::string& name) {
    for (const auto& [n, p] : parameters_)
      if (n.ends_with(name)) return p;
    throw std::runtime_error(name);
  };
  find("0.attn.q_proj.weight").mutable_grad().view(-1)[5] = inf;
  EXPECT_EQ(first_bad_tensor(*model_, parameters_, batches),
            "gradient of model.layers.0.attn.q_proj.weight (1 of 256 values are not finite)");
  c10::NoGradGuard no_grad;
  // Finite weights can overflow on the way.
  const at::Tensor head = find("lm_head.weight");
  const at::Tensor before = head.clone();
  head.fill_(3e38f);
  EXPECT_THAT(first_bad_tensor(*model_, parameters_, batches), HasSubstr("activation \"logits\""));
  head.copy_(before);
  find("1.attn.o_norm.weight").fill_(1e6f);
  find("1.attn.o_proj.weight").fill_(3e38f);
  EXPECT_THAT(first_bad_tensor(*model_, parameters_, batches), HasSubstr("activation \"hidden\""));
  find("model.norm.weight").view(-1)[2] = nan;
  EXPECT_EQ(first_bad_tensor(*model_, parameters_, batches),
            "parameter model.norm.weight (1 of 16 values are not finite)");
}

}  // namespace
}  // namespace gdn
