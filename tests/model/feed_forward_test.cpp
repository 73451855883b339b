// SPDX-License-Identifier: Apache-2.0
// The feed-forward blocks by the mixers' contract: forms, splits, packing, gradients; and the
// balance loss of the experts.
#include "gdn/model/feed_forward.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <cmath>

#include "gdn/base/check.h"
#include "gdn/model/causal_lm.h"

namespace gdn {
namespace {

using nlohmann::json;

constexpr int64_t kWidth = 6;

std::shared_ptr<Mixer> make(const std::string& name, const json& options = json::object()) {
  ModelConfig config;
  config.hidden_size = kWidth;
  config.intermediate_size = 9;
  config.blocks.resize(3);
  config.blocks[1].feed_forward = name;
  config.blocks[1].feed_forward_options = options;
  config.validate();
  auto block = make_feed_forward(config, 1);
  block->to(at::kDouble);
  return block;
}

std::vector<std::pair<std::string, json>> all_blocks() {
  return {{"swiglu", json::object()},
          {"rwkv_channel_mix", json::object()},
          {"moe", {{"num_experts", 5}, {"moe_intermediate_size", 4}}},
          {"moe",
           {{"num_experts", 4},
            {"num_experts_per_tok", 3},
            {"moe_intermediate_size", 3},
            {"shared_expert_intermediate_size", 5},
            {"norm_topk_prob", false}}}};
}

void expect_near(const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_LE((actual - expected).abs().max().item<double>(), 1e-10) << what;
}

TEST(FeedForward, WholeSplitPackedAndNaiveAgree) {
  for (const auto& [name, options] : all_blocks()) {
    torch::manual_seed(1);
    const auto block = make(name, options);
    const at::Tensor x = at::randn({2, 12, kWidth}, at::kDouble);
    const at::Tensor whole = block->forward(x, {});
    EXPECT_GT(whole.abs().max().item<double>(), 1e-4) << name;
    block->use_naive(true);
    expect_near(block->forward(x, {}), whole, name + " naive");
    block->use_naive(false);
    for (const bool grad : {false, true}) {
      c10::AutoGradMode mode(grad);
      for (const int64_t cut : {0, 5, 12}) {
        State state = block->zero_state(2, x.options());
        Context ctx;
        ctx.state = &state;
        const at::Tensor first = block->forward(x.narrow(1, 0, cut), ctx);
        std::vector<at::Tensor> parts = {first};
        for (int64_t t = cut; t < 12; ++t) parts.push_back(block->forward(x.narrow(1, t, 1), ctx));
        expect_near(at::cat(parts, 1), whole, name + " split");
      }
      // Packed, with an empty sequence, going on from a state.
      const at::Tensor row = at::cat({x.narrow(0, 0, 1), x.narrow(0, 1, 1).narrow(1, 0, 7)}, 1);
      Context packed;
      packed.seqs.cu_seqlens = at::tensor({0, 12, 12, 19}, at::kLong);
      State state = block->zero_state(3, x.options());
      packed.state = &state;
      const at::Tensor y = block->forward(row, packed);
      expect_near(y.narrow(1, 0, 12), whole.narrow(0, 0, 1), name + " packed");
      expect_near(y.narrow(1, 12, 7), whole.narrow(0, 1, 1).narrow(1, 0, 7), name + " packed");
      packed.seqs.cu_seqlens = at::tensor({0, 0, 0, 5}, at::kLong);
      const at::Tensor rest = block->forward(x.narrow(0, 1, 1).narrow(1, 7, 5), packed);
      expect_near(rest, whole.narrow(0, 1, 1).narrow(1, 7, 5), name + " continued");
    }
  }
}

TEST(FeedForward, GradientsEqualDifferences) {
  for (const auto& [name, options] : all_blocks()) {
    torch::manual_seed(2);
    const auto block = make(name, options);
    at::Tensor x = at::randn({2, 7, kWidth}, at::kDouble).requires_grad_();
    const at::Tensor w = at::randn({2, 7, kWidth}, at::kDouble);
    const bool has_state = name == "rwkv_channel_mix";
    at::Tensor shift = at::randn({2, kWidth}, at::kDouble).requires_grad_();
    const auto loss = [&] {
      State state = block->zero_state(2, x.options());
      Shared shared;
      Context ctx;
      ctx.shared = &shared;
      if (has_state) {
        state.set("shift", c10::GradMode::is_enabled() ? shift : shift.clone());
        ctx.state = &state;
      }
      const at::Tensor y = (block->forward(x, ctx) * w).sum();
      return shared.auxiliary_loss.defined() ? y + 0.0 * shared.auxiliary_loss : y;
    };
    std::vector<std::pair<std::string, at::Tensor>> inputs = {{"x", x}};
    if (has_state) inputs.emplace_back("shift", shift);
    for (const auto& p : block->named_parameters()) inputs.emplace_back(p.key(), p.value());
    std::vector<at::Tensor> tensors;
    for (const auto& input : inputs) tensors.push_back(input.second);
    const auto grads = torch::autograd::grad({loss()}, tensors, {}, std::nullopt, false, true);
    c10::NoGradGuard no_grad;
    double influence = 0;
    for (size_t n = 0; n < tensors.size(); ++n) {
      if (!grads[n].defined()) continue;  // an expert that no token took
      double* values = tensors[n].mutable_data_ptr<double>();
      const at::Tensor grad = grads[n].contiguous();
      for (int64_t i = 0; i < tensors[n].numel(); i += 1 + tensors[n].numel() / 7) {
        const double keep = values[i], step = 1e-6;
        values[i] = keep + step;
        const double up = loss().item<double>();
        values[i] = keep - step;
        const double down = loss().item<double>();
        values[i] = keep;
        const double numeric = (up - down) / (2 * step);
        EXPECT_NEAR(grad.const_data_ptr<double>()[i], numeric, 1e-6 * (1 + std::abs(numeric)))
            << name << " " << inputs[n].first << "[" << i << "]";
        influence += std::abs(numeric);
      }
    }
    EXPECT_GT(influence, 0.1) << name;
  }
}

TEST(ChannelMix, IsItsFormula) {
  torch::manual_seed(5);
  const auto block = make("rwkv_channel_mix");
  c10::NoGradGuard no_grad;
  for (const auto& p : block->named_parameters())
    at::Tensor(p.value()).add_(at::randn_like(p.value()) * 0.2);
  const auto parameters = block->named_parameters();
  const at::Tensor x = at::randn({1, 8, kWidth}, at::kDouble);
  const at::Tensor before = at::cat({at::zeros({1, 1, kWidth}, at::kDouble), x.narrow(1, 0, 7)}, 1);
  const auto map = [&](const std::string& name, const at::Tensor& in) {
    return at::einsum("btd,ed->bte", {in, parameters[name + ".weight"]});
  };
  const auto mixed = [&](const char* name) {
    return parameters[name] * x + (1 - parameters[name]) * before;
  };
  const at::Tensor k = map("key", mixed("time_mix_key")).clamp_min(0).square();
  const at::Tensor r = map("receptance", mixed("time_mix_receptance")).sigmoid();
  expect_near(block->forward(x, {}), r * map("value", k), "channel mix");
}

// The formula of the mixture, written out for every token.
TEST(Moe, IsTheWeightedSumOfTheLikeliestExperts) {
  torch::manual_seed(3);
  const auto block = make("moe", {{"num_experts", 4}, {"shared_expert_intermediate_size", 3}});
  c10::NoGradGuard no_grad;
  const auto parameters = block->named_parameters();
  const auto expert = [&](const std::string& name, const at::Tensor& x) {
    const auto map = [&](const char* part, const at::Tensor& in) {
      return at::einsum("d,ed->e", {in, parameters[name + part]});
    };
    const at::Tensor gate = map(".gate_proj.weight", x);
    return map(".down_proj.weight", gate * gate.sigmoid() * map(".up_proj.weight", x));
  };
  const at::Tensor x = at::randn({1, 9, kWidth}, at::kDouble), y = block->forward(x, {});
  for (int64_t t = 0; t < 9; ++t) {
    const at::Tensor token = x[0][t];
    const at::Tensor p = at::einsum("d,ed->e", {token, parameters["gate.weight"]}).softmax(0);
    int64_t best = p.argmax().item<int64_t>();
    at::Tensor rest = p.clone();
    rest[best] = -1;
    int64_t second = rest.argmax().item<int64_t>();
    const at::Tensor sum = p[best] + p[second];
    at::Tensor expected = p[best] / sum * expert("experts." + std::to_string(best), token) +
                          p[second] / sum * expert("experts." + std::to_string(second), token);
    const at::Tensor own =
        at::einsum("d,ed->e", {token, parameters["shared_expert_gate.weight"]}).sigmoid();
    expected = expected + own * expert("shared_expert", token);
    expect_near(y[0][t], expected, "token " + std::to_string(t));
  }
}

TEST(Moe, BalanceLossReachesTheModelsLossInTrainingOnly) {
  ModelConfig config;
  config.vocab_size = 11;
  config.hidden_size = 8;
  config.blocks.resize(2);
  for (BlockConfig& block : config.blocks) {
    block.feed_forward = "moe";
    block.feed_forward_options = {{"num_experts", 4},
                                  {"num_experts_per_tok", 2},
                                  {"moe_intermediate_size", 4},
                                  {"router_aux_loss_coef", 0.5}};
  }
  torch::manual_seed(4);
  CausalLM model(config);
  const at::Tensor ids = at::randint(11, {2, 10}, at::kLong);
  double plain;
  {
    c10::NoGradGuard no_grad;
    plain = model.loss(ids, ids).item<double>();
  }
  const double with_balance = model.loss(ids, ids).item<double>();
  // Perfect balance gives the coefficient times the experts per token, for each layer.
  EXPECT_NEAR(with_balance - plain, 2 * 0.5 * 2, 0.2);
  model.set_gradient_checkpointing(true);
  EXPECT_NEAR(model.loss(ids, ids).item<double>(), with_balance, 1e-5);
  model.loss(ids, ids).backward();
  EXPECT_GT(model.named_parameters()["model.layers.0.mlp.gate.weight"].grad().norm().item<double>(),
            0);
  // A router that sends every token to the same two experts pays for it.
  {
    c10::NoGradGuard no_grad;
    auto parameters = model.named_parameters();
    parameters["model.embeddings.weight"].abs_();
    for (const char* layer : {"0", "1"}) {
      at::Tensor gate = parameters["model.layers." + std::string(layer) + ".mlp.gate.weight"];
      gate.zero_();
      gate.narrow(0, 0, 2).fill_(3.0);
    }
    plain = model.loss(ids, ids).item<double>();
  }
  EXPECT_GT(model.loss(ids, ids).item<double>() - plain, 3.0);
}

TEST(FeedForward, OptionsAreChecked) {
  const auto error = [](const std::string& name, const json& options) -> std::string {
    try {
      make(name, options);
    } catch (const UsageError& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error("mo", json::object()),
            "[config] blocks[1]: unknown feed_forward \"mo\" (did you mean \"moe\"?) (known: "
            "\"swiglu\", \"moe\", \"rwkv_channel_mix\", or \"\" for none)");
  EXPECT_EQ(error("moe", {{"num_experts", 4}, {"num_experts_per_tok", 5}}),
            "[config] blocks[1]: num_experts_per_tok must be in [1, 4], got 5");
  EXPECT_THAT(error("moe", {{"router_aux_loss_coef", -1.0}}),
              ::testing::HasSubstr("router_aux_loss_coef must not be negative, got -1"));
  EXPECT_THAT(error("swiglu", {{"num_experts", 5}}), ::testing::HasSubstr("unknown key"));
}

}  // namespace
}  // namespace gdn
