// SPDX-License-Identifier: Apache-2.0
// Options of the mixers with a memory that learns at test time, what they change, and constant
// memory while decoding.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <cmath>
#include <map>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"
#include "gdn/mixers/titans/attention.h"
#include "gdn/ops/test_time_memory.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::shared_ptr<Mixer> make(const char* name, const json& options, int64_t hidden_size = 8) {
  torch::manual_seed(2);
  MixerArgs args;
  args.hidden_size = hidden_size;
  args.options = options;
  const auto mixer = make_mixer(name, args);
  mixer->to(at::kDouble);
  return mixer;
}

std::string usage_error(const char* name, const json& options) {
  try {
    make(name, options);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no UsageError";
}

TEST(MemoryMixers, OptionsAreChecked) {
  EXPECT_EQ(usage_error("ttt_linear", {{"num_heads", 3}}),
            "[ttt_linear] num_heads must divide hidden_size (8) unless head_dim is given, got 3");
  EXPECT_EQ(usage_error("ttt_linear", {{"head_dim", 3}}),
            "[ttt_linear] head_dim must be even for rotary positions, got 3");
  EXPECT_THAT(usage_error("ttt_mlp", {{"base_lr", 0.0}}), HasSubstr("base_lr must be positive"));
  EXPECT_THAT(usage_error("ttt_mlp", {{"expansion", 0.0}}),
              HasSubstr("expansion * head_dim must be at least 1, got 0"));
  EXPECT_THAT(usage_error("ttt_linear", {{"mini_batch_size", 0}}),
              HasSubstr("mini_batch_size must be an integer of at least 1"));
  EXPECT_EQ(usage_error("titans_lmm", {{"memory_depth", 5}}),
            "[titans_lmm] memory_depth must be 1 to 4, got 5");
  EXPECT_THAT(usage_error("titans_lmm", {{"rates", "all"}}),
              HasSubstr("rates must be one of token, chunk, got \"all\""));
  EXPECT_THAT(usage_error("titans_lmm", {{"inner_clip", -1.0}}),
              HasSubstr("inner_clip must not be negative"));
  EXPECT_THAT(usage_error("titans_lmm", {{"theta_max", 0.0}}),
              HasSubstr("theta_max must be positive"));
  EXPECT_EQ(usage_error("titans_mac", {{"segment_size", 8}, {"read_delay", 3}}),
            "[titans_mac] read_delay must divide segment_size (8), got 3");
  EXPECT_THAT(usage_error("titans_mag", {{"persistent_tokens", -1}}),
              HasSubstr("persistent_tokens must be an integer of at least 0, got -1"));
  EXPECT_THAT(usage_error("titans_mal", {{"gate", "memory"}}),
              HasSubstr("unknown option \"gate\""));
}

// Every option must change what the mixer computes from the same parameters.
TEST(MemoryMixers, OptionsMatter) {
  struct Change {
    const char* mixer;
    json options;
  };
  const json none = json::object();
  for (const Change& change :
       std::vector<Change>{{"ttt_linear", {{"mini_batch_size", 3}}},
                           {"ttt_linear", {{"base_lr", 0.5}}},
                           {"ttt_linear", {{"rope_theta", 0.0}}},
                           {"titans_lmm", {{"memory_activation", "gelu"}}},
                           {"titans_lmm", {{"chunk_size", 3}}},
                           {"titans_lmm", {{"decay_to", "zero"}}},
                           {"titans_lmm", {{"inner_loss", "half"}, {"theta_max", 0.5}}},
                           {"titans_lmm", {{"theta_scale", "stable"}}},
                           {"titans_lmm", {{"rates", "chunk"}, {"chunk_size", 4}}},
                           {"titans_lmm", {{"inner_clip", 0.1}}},
                           {"titans_lmm", {{"read", "before"}}},
                           {"titans_lmm", {{"qk_norm", false}}},
                           {"titans_mag", {{"window_size", 2}}},
                           {"titans_mag", {{"gate", "both"}}},
                           {"titans_mag", {{"gate_activation", "silu"}}},
                           {"titans_mal", {{"rope_theta", 0.0}}},
                           {"titans_mac", {{"segment_size", 4}}},
                           {"titans_mac", {{"read_delay", 2}}}}) {
    json base = change.options.contains("rates") ? json({{"chunk_size", 4}}) : none;
    const auto a = make(change.mixer, base), b = make(change.mixer, change.options);
    const c10::NoGradGuard no_grad;
    // Steps that are large enough to tell.
    const at::Tensor x = at::randn({1, 11, 8}, at::kDouble) * 3;
    auto to = b->named_parameters();
    for (const auto& p : a->named_parameters()) {
      if (p.key().find("learnable_token_idx") != std::string::npos) continue;
      to[p.key()].copy_(p.value());
    }
    EXPECT_GT((a->forward(x, {}) - b->forward(x, {})).abs().max().item<double>(), 1e-9)
        << change.mixer << " " << change.options.dump();
  }
}

TEST(MemoryMixers, StatesDoNotGrow) {
  const c10::NoGradGuard no_grad;
  for (const char* name :
       {"ttt_linear", "ttt_mlp", "titans_lmm", "titans_mac", "titans_mag", "titans_mal"}) {
    const auto mixer = make(name, json::object());
    State state = mixer->zero_state(1, at::TensorOptions(at::kDouble));
    const int64_t bytes = state.bytes();
    Context ctx;
    ctx.state = &state;
    mixer->forward(at::randn({1, 200, 8}, at::kDouble), ctx);
    for (int t = 0; t < 70; ++t) mixer->forward(at::randn({1, 1, 8}, at::kDouble), ctx);
    EXPECT_EQ(state.bytes(), bytes) << name;
    EXPECT_EQ(state["tokens"][0].item<int64_t>(), 270) << name;
  }
}

// The persistent tokens are read once, before the sequence: their start is that of a sequence which
// has them in front, but for the chunks and convolutions, which begin anew.
TEST(MemoryMixers, PersistentTokensMoveTheStart) {
  const c10::NoGradGuard no_grad;
  for (const char* name : {"titans_mag", "titans_mal", "titans_mac"}) {
    const auto mixer = make(name, json::object());
    const at::Tensor x = at::randn({2, 6, 8}, at::kDouble);
    const at::Tensor before = mixer->forward(x, {});
    mixer->named_parameters()["persistent"].mul_(2);
    EXPECT_GT((mixer->forward(x, {}) - before).abs().max().item<double>(), 1e-9) << name;
  }
}

// What the memory is after persistent tokens and a text: that of the same memory reading both as
// one text, momentum included. Single-token chunks and no convolution, so that the cut does not
// show.
TEST(MemoryMixers, PersistentTokensAreReadBeforeTheText) {
  c10::NoGradGuard no_grad;
  const json options = {
      {"head_dim", 4}, {"num_heads", 2}, {"chunk_size", 1}, {"use_short_conv", false}};
  json with = options;
  with["persistent_tokens"] = 3;
  for (const int64_t T : {1, 5}) {
    const auto beside = make("titans_mag", with), alone = make("titans_lmm", options);
    auto from = beside->named_parameters(), to = alone->named_parameters();
    from["persistent"].mul_(30);
    for (auto& p : to) {
      if (p.key().starts_with("memory.")) p.value().copy_(from[p.key()]);
    }
    const at::Tensor x = at::randn({1, T, 8}, at::kDouble);
    const auto state_after = [](Mixer& mixer, const at::Tensor& text) {
      State state = mixer.zero_state(1, at::kDouble);
      Context ctx;
      ctx.state = &state;
      mixer.forward(text, ctx);
      return state;
    };
    const State a = state_after(*beside, x);
    const State b = state_after(*alone, at::cat({from["persistent"].unsqueeze(0), x}, 1));
    for (const char* name : {"memory", "momentum"}) {
      EXPECT_GT(b[name].abs().max().item<double>(), 1e-3);
      EXPECT_LE((a[name] - b[name]).abs().max().item<double>(), 1e-12) << name << " T=" << T;
    }
  }
}

// MAL written out: causal attention over what the memory answers to the persistent tokens and to
// the text. One head, so that titans_lmm's norm of heads is MAL's norm.
TEST(MemoryMixers, MalAttendsToWhatPersistentTokensRead) {
  c10::NoGradGuard no_grad;
  const json options = {
      {"head_dim", 8}, {"num_heads", 1}, {"chunk_size", 1}, {"use_short_conv", false}};
  json layered = options, plain = options;
  layered.update({{"persistent_tokens", 2}, {"rope_theta", 0.0}});
  plain["use_gate"] = false;
  const auto mal = make("titans_mal", layered), lmm = make("titans_lmm", plain);
  auto from = mal->named_parameters(), to = lmm->named_parameters();
  from["persistent"].mul_(30);
  from["memory_norm.weight"].add_(at::rand({8}, at::kDouble));
  for (auto& p : to) {
    if (p.key().starts_with("memory.")) p.value().copy_(from[p.key()]);
  }
  to["o_norm.weight"].copy_(from["memory_norm.weight"]);
  to["o_proj.weight"].copy_(at::eye(8, at::kDouble));
  const at::Tensor x = at::randn({1, 3, 8}, at::kDouble);
  const at::Tensor n = lmm->forward(at::cat({from["persistent"].unsqueeze(0), x}, 1), {})[0];
  const auto map = [&](const at::Tensor& t, const char* name) {
    return at::linear(t, from[std::string("attention.") + name + ".weight"]);
  };
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < 3; ++t) {
    const at::Tensor seen = n.narrow(0, 0, 3 + t);
    const at::Tensor scores = at::mv(map(seen, "k_proj"), map(n[2 + t], "q_proj")) / std::sqrt(8.0);
    rows.push_back(at::mv(map(seen, "v_proj").t(), at::softmax(scores, 0)));
  }
  const at::Tensor expected = at::linear(at::stack(rows), from["o_proj.weight"]);
  EXPECT_LE((mal->forward(x, {})[0] - expected).abs().max().item<double>(), 1e-10);
}

TEST(MemoryMixers, GatesCombineNormedBranches) {
  c10::NoGradGuard no_grad;
  torch::manual_seed(8);
  const at::Tensor y = at::randn({2, 3, 8}, at::kDouble), m = at::randn({2, 3, 8}, at::kDouble);
  const auto normed = [](const at::Tensor& t) {
    return t / (t.square().mean(-1, true) + 1e-6).sqrt();
  };
  const at::Tensor a = normed(y), b = normed(m);
  for (const char* activation : {"sigmoid", "silu"}) {
    const auto act = [&](const at::Tensor& t) {
      return activation == std::string("silu") ? at::silu(t) : at::sigmoid(t);
    };
    const std::vector<std::pair<const char*, at::Tensor>> gates = {
        {"memory", a * act(b)}, {"both", act(a) * act(b)}, {"product", act(a * b)}};
    for (const auto& [name, expected] : gates) {
      MixerArgs args;
      args.options = {{"gate", name}, {"gate_activation", activation}};
      BranchGate gate(Options("titans_mag", args), 8, 1e-6);
      gate.to(at::kDouble);
      EXPECT_LE((gate.forward(y, m, false) - expected).abs().max().item<double>(), 1e-10)
          << name << activation;
    }
  }
}

// The layers written out around the memory's definition, which the contract cannot do: its naive
// form shares the layer's code.
struct Written {
  explicit Written(const std::shared_ptr<Mixer>& mixer) {
    c10::NoGradGuard no_grad;
    for (auto& p : mixer->named_parameters()) {
      p.value().add_(0.3 *
                     at::randn(p.value().sizes(), at::kDouble));  // zeros and ones hide errors
      parameters[p.key()] = p.value();
    }
  }
  at::Tensor heads(const at::Tensor& x, const std::string& name) const {  // 2 heads of 4
    return at::linear(x, parameters.at(name + ".weight")).view({1, x.size(1), 2, 4});
  }
  std::map<std::string, at::Tensor> parameters;
};

TEST(MemoryMixers, TttLinearIsWhatItsReadmeSays) {
  c10::NoGradGuard no_grad;
  const auto mixer =
      make("ttt_linear", {{"head_dim", 4}, {"mini_batch_size", 3}, {"base_lr", 2.0}});
  const Written w(mixer);
  auto p = w.parameters;
  p["learnable_token_idx"].select(0, 1).fill_(-2);  // tau is not negative
  const at::Tensor x = at::randn({1, 7, 8}, at::kDouble);
  const auto turned = [](const at::Tensor& t) {  // positions begin anew in every mini-batch
    at::Tensor y = t.clone();
    for (int64_t i = 0; i < t.size(1); ++i) {
      for (int64_t c = 0; c < 2; ++c) {
        const double angle = static_cast<double>(i % 3) * std::pow(10000.0, -c / 2.0);
        const at::Tensor low = t.select(1, i).select(2, c), high = t.select(1, i).select(2, c + 2);
        y.select(1, i).select(2, c).copy_(low * std::cos(angle) - high * std::sin(angle));
        y.select(1, i).select(2, c + 2).copy_(high * std::cos(angle) + low * std::sin(angle));
      }
    }
    return y;
  };
  ops::MemoryConfig config;
  config.rule = "ttt";
  config.activation = "gelu";
  config.bias = true;
  config.chunk = 3;
  ops::MemoryTensors in;
  in.q = turned(w.heads(x, "q_proj"));
  in.k = turned(w.heads(x, "k_proj"));
  in.v = w.heads(x, "v_proj");
  in.rate = 2.0 / 4 *
            at::sigmoid(at::linear(x, p["learnable_ttt_lr_weight"].view({2, 8})) +
                        p["learnable_ttt_lr_bias"].view({2}));
  in.tau = (1 / at::arange(1, 4, at::kDouble) + p["learnable_token_idx"]).clamp_min(0);
  in.norm_weight = p["ttt_norm_weight"];
  in.norm_bias = p["ttt_norm_bias"];
  in.memory = at::cat({p["start.W1"].flatten(1), p["start.b1"].flatten(1)}, 1).unsqueeze(0);
  const at::Tensor o = ops::naive::test_time_memory(in, config).o.reshape({1, 7, 8});
  const at::Tensor normed =
      at::layer_norm(o, {8}, p["post_norm_weight"], p["post_norm_bias"], 1e-6);
  const at::Tensor expected = at::linear(normed, p["o_proj.weight"]);
  EXPECT_EQ(in.tau[1].item<double>(), 0);
  EXPECT_LE((mixer->forward(x, {}) - expected).abs().max().item<double>(), 1e-10);
}

TEST(MemoryMixers, TheLongTermMemoryIsWhatItsReadmeSays) {
  c10::NoGradGuard no_grad;
  for (const char* loss : {"sum", "half", "mean"}) {
    for (const char* scale : {"fixed", "stable"}) {
      const auto mixer = make("titans_lmm", {{"head_dim", 4},
                                             {"num_heads", 2},
                                             {"expansion", 1.5},
                                             {"chunk_size", 3},
                                             {"use_short_conv", false},
                                             {"use_gate", false},
                                             {"memory_norm", true},
                                             {"inner_loss", loss},
                                             {"theta_scale", scale}});
      const Written w(mixer);
      auto p = w.parameters;
      const at::Tensor x = at::randn({1, 7, 8}, at::kDouble);
      const auto unit = [](const at::Tensor& t) {
        return t / (t.square().sum(-1, true) + 1e-6).sqrt();
      };
      ops::MemoryConfig config;
      config.depth = 2;
      config.hidden = 6;
      config.chunk = 3;
      config.clip = 10;
      config.norm_eps = MixerArgs().norm_eps;
      config.loss_scale = loss == std::string("sum") ? 2 : loss == std::string("half") ? 1 : 0.5;
      ops::MemoryTensors in;
      in.q = unit(at::silu(w.heads(x, "memory.q_proj")));
      in.k = unit(at::silu(w.heads(x, "memory.k_proj")));
      in.v = at::silu(w.heads(x, "memory.v_proj"));
      const at::Tensor rates =
          at::sigmoid(at::linear(x, p["memory.rates_proj.weight"]) + p["memory.rates_bias"]);
      in.eta = rates.narrow(2, 2, 2);
      in.alpha = rates.narrow(2, 4, 2);
      in.rate = rates.narrow(2, 0, 2) / config.loss_scale;  // theta_max
      if (scale == std::string("stable")) in.rate = in.rate * (2 - in.alpha) * (1 - in.eta) / 3;
      in.norm_weight = p["memory.memory_norm_weight"];
      in.norm_bias = p["memory.memory_norm_bias"];
      in.anchor = at::cat({p["memory.start.W1"].flatten(1), p["memory.start.W2"].flatten(1)}, 1);
      in.memory = in.anchor.unsqueeze(0);
      const at::Tensor o = ops::naive::test_time_memory(in, config).o;
      const at::Tensor normed =
          o / (o.square().mean(-1, true) + MixerArgs().norm_eps).sqrt() * p["o_norm.weight"];
      const at::Tensor expected = at::linear(normed.reshape({1, 7, 8}), p["o_proj.weight"]);
      EXPECT_LE((mixer->forward(x, {}) - expected).abs().max().item<double>(), 1e-10)
          << loss << scale;
    }
  }
}

}  // namespace
}  // namespace gdn
