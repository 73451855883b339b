// SPDX-License-Identifier: Apache-2.0
// Options of the mixers with a memory that learns at test time, what they change, and constant
// memory while decoding.
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"

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

}  // namespace
}  // namespace gdn
