// SPDX-License-Identifier: Apache-2.0
// The registry, options and their errors, states, and the parameter names that checkpoints rely on.
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::shared_ptr<Mixer> make(const char* name, int64_t hidden_size,
                            const json& options = json::object()) {
  MixerArgs args;
  args.hidden_size = hidden_size;
  args.options = options;
  return make_mixer(name, args);
}

std::string usage_error(const std::function<void()>& f) {
  try {
    f();
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no UsageError";
}

// "name [sizes]" of every parameter.
std::set<std::string> parameters(const Mixer& mixer) {
  std::set<std::string> result;
  for (const auto& p : mixer.named_parameters()) {
    std::string sizes;
    for (const int64_t size : p.value().sizes()) sizes += " " + std::to_string(size);
    result.insert(p.key() + sizes);
  }
  return result;
}

TEST(Registry, EntriesAreComplete) {
  std::set<std::string> names;
  for (const MixerInfo& info : mixers()) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name << " twice";
    EXPECT_FALSE(info.title.empty() || info.paper.empty() || info.devices.empty()) << info.name;
    EXPECT_THAT(info.forms, ::testing::Contains("naive")) << info.name;
    std::set<std::string> options;
    for (const MixerOption& option : info.options) {
      EXPECT_TRUE(options.insert(option.name).second) << option.name;
      EXPECT_FALSE(option.help.empty()) << info.name << " " << option.name;
      if (option.default_value.is_null()) {
        EXPECT_THAT(option.help, HasSubstr("default: "));
      }
    }
    // Null asks for the default; giving every default must change nothing.
    json all = json::object();
    for (const MixerOption& option : info.options) all[option.name] = option.default_value;
    EXPECT_EQ(parameters(*make(info.name.c_str(), 24, all)),
              parameters(*make(info.name.c_str(), 24)));
    for (const int64_t width : {1, 5, 63, 64, 96, 193}) make(info.name.c_str(), width);
  }
}

TEST(Registry, WrongNamesAndTypes) {
  EXPECT_THAT(
      usage_error([] { find_mixer("gated_deltanet"); }),
      AllOf(HasSubstr("unknown mixer \"gated_deltanet\" (did you mean \"gated_delta_net\"?)"),
            HasSubstr("attention")));
  EXPECT_THAT(usage_error([] { find_mixer("zzz"); }), HasSubstr("known mixers: gated_delta_net, "));
  EXPECT_EQ(usage_error([] {
              make("attention", 8, {{"num_head", 2}});
            }),
            "[attention] unknown option \"num_head\" (did you mean \"num_heads\"?)");
  EXPECT_EQ(usage_error([] {
              make("attention", 8, {{"qkv_bias", 1}});
            }),
            "[attention] qkv_bias must be true or false, got 1");
  EXPECT_EQ(usage_error([] {
              make("attention", 8, {{"num_heads", 2.5}});
            }),
            "[attention] num_heads must be an integer of at least 1, got 2.5");
  EXPECT_EQ(usage_error([] {
              make("gated_delta_net", 8, {{"head_dim", 0}});
            }),
            "[gated_delta_net] head_dim must be an integer of at least 1, got 0");
  EXPECT_EQ(usage_error([] {
              make("gated_delta_net", 8, {{"mode", "fast"}});
            }),
            "[gated_delta_net] mode must be one of chunk, fused_recurrent, got \"fast\"");
  EXPECT_EQ(usage_error([] {
              make("gated_delta_net", 8, {{"expand_v", "two"}});
            }),
            "[gated_delta_net] expand_v must be a number, got \"two\"");
  EXPECT_THAT(usage_error([] { make("attention", 8, json::array()); }),
              HasSubstr("options must be a table of names and values, got []"));
  EXPECT_THAT(usage_error([] { make("attention", 0); }),
              HasSubstr("hidden_size must be at least 1"));
}

TEST(Registry, SizesThatDoNotDivide) {
  EXPECT_EQ(usage_error([] {
              make("gated_delta_net", 8, {{"num_heads", 2}, {"num_v_heads", 3}});
            }),
            "[gated_delta_net] num_v_heads must be a multiple of num_heads (2), got 3");
  EXPECT_THAT(
      usage_error([] {
        make("gated_delta_net", 8, {{"head_dim", 5}, {"expand_v", 1.5}});
      }),
      HasSubstr("head_dim * expand_v must be a whole number of at least 1, got 5 * 1.5 = 7.5"));
  EXPECT_EQ(usage_error([] {
              make("gated_delta_net", 8, {{"conv_size", 9}});
            }),
            "[gated_delta_net] conv_size must be at most 8, got 9");
  EXPECT_THAT(usage_error([] {
                make("delta_net", 10, {{"num_heads", 4}});
              }),
              HasSubstr("num_heads must divide the widths of keys and values (10 and 10), got 4"));
  EXPECT_THAT(usage_error([] {
                make("delta_net", 8, {{"qk_norm", "sum"}});
              }),
              HasSubstr("qk_norm \"sum\" needs a qk_activation without negative values"));
  EXPECT_THAT(usage_error([] {
                make("attention", 10, {{"num_heads", 4}});
              }),
              HasSubstr("num_heads must divide hidden_size (10) unless head_dim is given, got 4"));
  EXPECT_THAT(usage_error([] {
                make("attention", 8, {{"num_heads", 4}, {"num_kv_heads", 3}});
              }),
              HasSubstr("num_kv_heads must divide num_heads (4), got 3"));
  EXPECT_THAT(usage_error([] {
                make("attention", 9, {{"num_heads", 3}});
              }),
              HasSubstr("head_dim must be even for rotary positions, got 3"));
}

TEST(Registry, DefaultSizesFollowTheWidth) {
  // fla's 6 heads of 256 at width 2048, and three quarters of the width in general
  EXPECT_THAT(parameters(*make("gated_delta_net", 2048)),
              ::testing::IsSupersetOf({"q_proj.weight 1536 2048", "v_proj.weight 3072 2048",
                                       "b_proj.weight 6 2048", "o_norm.weight 512"}));
  EXPECT_THAT(parameters(*make("gated_delta_net", 256)),
              ::testing::IsSupersetOf({"q_proj.weight 192 256", "A_log 3"}));
}

TEST(Registry, ParameterNamesAreFlas) {
  EXPECT_THAT(parameters(*make(
                  "gated_delta_net", 8,
                  {{"head_dim", 3}, {"num_heads", 2}, {"num_v_heads", 4}, {"conv_bias", true}})),
              ElementsAre("A_log 4", "a_proj.weight 4 8", "b_proj.weight 4 8", "dt_bias 4",
                          "g_proj.weight 24 8", "k_conv1d.bias 6", "k_conv1d.weight 6 1 4",
                          "k_proj.weight 6 8", "o_norm.weight 6", "o_proj.weight 8 24",
                          "q_conv1d.bias 6", "q_conv1d.weight 6 1 4", "q_proj.weight 6 8",
                          "v_conv1d.bias 24", "v_conv1d.weight 24 1 4", "v_proj.weight 24 8"));
  EXPECT_THAT(parameters(*make("delta_net", 8, {{"num_heads", 2}})),
              ElementsAre("b_proj.weight 2 8", "k_conv1d.weight 8 1 4", "k_proj.weight 8 8",
                          "o_norm.weight 4", "o_proj.weight 8 8", "q_conv1d.weight 8 1 4",
                          "q_proj.weight 8 8", "v_conv1d.weight 8 1 4", "v_proj.weight 8 8"));
  EXPECT_THAT(parameters(*make(
                  "attention", 8,
                  {{"num_heads", 2}, {"num_kv_heads", 1}, {"qkv_bias", true}, {"qk_norm", true}})),
              ElementsAre("k_norm.weight 4", "k_proj.bias 4", "k_proj.weight 4 8",
                          "o_proj.weight 8 8", "q_norm.weight 4", "q_proj.bias 8",
                          "q_proj.weight 8 8", "v_proj.bias 4", "v_proj.weight 4 8"));
}

TEST(Registry, GatesStartAsInFla) {
  const auto mixer = make("gated_delta_net", 64, {{"head_dim", 1}, {"num_heads", 64}});
  const auto parameters = mixer->named_parameters();
  const at::Tensor A = parameters["A_log"].exp(), dt = parameters["dt_bias"].exp().log1p();
  EXPECT_LT(A.max().item<float>(), 16.0f);
  EXPECT_GT(A.max().item<float>(), 10.0f);
  EXPECT_LT(A.min().item<float>(), 4.0f);
  EXPECT_GE(dt.min().item<float>(), 0.00099f);
  EXPECT_LT(dt.min().item<float>(), 0.005f);
  EXPECT_LE(dt.max().item<float>(), 0.101f);
  EXPECT_GT(dt.max().item<float>(), 0.02f);
}

TEST(State, IsAListOfNamedTensors) {
  State state;
  EXPECT_TRUE(state.empty());
  EXPECT_EQ(state.num_sequences(), 0);
  state.set("a", at::arange(6, at::kFloat).view({3, 2}));
  state.set("b", at::arange(3, at::kLong));
  EXPECT_TRUE(state.has("a") && !state.has("c"));
  EXPECT_EQ(state.num_sequences(), 3);
  EXPECT_EQ(state.bytes(), 6 * 4 + 3 * 8);
  State shallow = state, deep = state.clone();
  state["a"].zero_();
  EXPECT_EQ(shallow["a"].sum().item<float>(), 0.0f);
  EXPECT_EQ(deep["a"].sum().item<float>(), 15.0f);
  const State some = deep.index(at::tensor({2, 0}, at::kLong));
  EXPECT_EQ(some["b"][0].item<int64_t>(), 2);
  EXPECT_EQ(some["a"][1][1].item<float>(), 1.0f);
  state.set("b", at::arange(3, at::kFloat));
  EXPECT_EQ(state.entries().size(), 2u);
  deep["a"].requires_grad_();
  EXPECT_FALSE(deep.detach()["a"].requires_grad());
  try {
    state["c"];
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[state] there is no entry \"c\", only: a, b");
  }
}

}  // namespace
}  // namespace gdn
