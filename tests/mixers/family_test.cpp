// SPDX-License-Identifier: Apache-2.0
// The mixers on the delta-rule engine: parameter names and sizes, initial values, states, and what
// they reject.
#include <ATen/ops/eye.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <cmath>
#include <fstream>
#include <set>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::IsSupersetOf;

std::shared_ptr<Mixer> make(const char* name, int64_t hidden_size,
                            const json& options = json::object()) {
  MixerArgs args;
  args.hidden_size = hidden_size;
  args.options = options;
  return make_mixer(name, args);
}

std::string usage_error(const char* name, int64_t hidden_size, const json& options) {
  try {
    make(name, hidden_size, options);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no UsageError";
}

// "name sizes" of every parameter.
std::set<std::string> parameters(const Mixer& mixer) {
  std::set<std::string> result;
  for (const auto& p : mixer.named_parameters()) {
    std::string sizes;
    for (const int64_t size : p.value().sizes()) sizes.append(" ").append(std::to_string(size));
    result.insert(p.key() + sizes);
  }
  return result;
}

TEST(Family, KimiDeltaAttentionHasFlasParameters) {
  EXPECT_THAT(parameters(*make("kimi_delta_attention", 8,
                               {{"head_dim", 3},
                                {"num_heads", 2},
                                {"num_v_heads", 4},
                                {"expand_v", 2.0},
                                {"conv_bias", true}})),
              ElementsAre("A_log 4", "b_proj.weight 4 8", "dt_bias 12", "f_proj.0.weight 6 8",
                          "f_proj.1.weight 12 6", "g_proj.0.weight 6 8", "g_proj.1.bias 24",
                          "g_proj.1.weight 24 6", "k_conv1d.bias 6", "k_conv1d.weight 6 1 4",
                          "k_proj.weight 6 8", "o_norm.weight 6", "o_proj.weight 8 24",
                          "q_conv1d.bias 6", "q_conv1d.weight 6 1 4", "q_proj.weight 6 8",
                          "v_conv1d.bias 24", "v_conv1d.weight 24 1 4", "v_proj.weight 24 8"));
  // fla's 16 heads of 128 for width 2048 keep all of the width in keys
  EXPECT_THAT(parameters(*make("kimi_delta_attention", 2048)),
              IsSupersetOf({"q_proj.weight 2048 2048", "v_proj.weight 2048 2048"}));
}

TEST(Family, GatedDeltaNet2HasAnEraseAndAWriteGate) {
  EXPECT_THAT(
      parameters(*make(
          "gated_delta_net_2", 8,
          {{"head_dim", 3}, {"num_heads", 2}, {"num_v_heads", 4}, {"use_short_conv", false}})),
      ElementsAre("A_log 4", "b_proj.weight 6 8", "dt_bias 12", "f_proj.0.weight 3 8",
                  "f_proj.1.weight 12 3", "g_proj.0.weight 3 8", "g_proj.1.bias 12",
                  "g_proj.1.weight 12 3", "k_proj.weight 6 8", "o_norm.weight 3",
                  "o_proj.weight 8 12", "q_proj.weight 6 8", "v_proj.weight 12 8",
                  "w_proj.weight 12 8"));
}

TEST(Family, GatedDeltaProductHasKeysForEveryStep) {
  EXPECT_THAT(parameters(*make("gated_delta_product", 8,
                               {{"head_dim", 3}, {"num_heads", 2}, {"num_householder", 3}})),
              ElementsAre("A_log 2", "a_proj.weight 2 8", "b_proj.weight 6 8", "dt_bias 2",
                          "g_proj.weight 12 8", "k_conv1d.weight 18 1 4", "k_proj.weight 18 8",
                          "o_norm.weight 6", "o_proj.weight 8 12", "q_conv1d.weight 6 1 4",
                          "q_proj.weight 6 8", "v_conv1d.weight 36 1 4", "v_proj.weight 36 8"));
}

TEST(Family, LinearMixersHaveFlasParameters) {
  EXPECT_THAT(
      parameters(*make("gla", 8, {{"num_heads", 4}, {"num_kv_heads", 2}})),
      ElementsAre("g_norm_swish_gate.weight 2", "g_proj.weight 8 8", "gk_proj.0.weight 16 8",
                  "gk_proj.1.bias 2", "gk_proj.1.weight 2 16", "k_proj.weight 2 8",
                  "o_proj.weight 8 8", "q_proj.weight 4 8", "v_proj.weight 4 8"));
  EXPECT_THAT(parameters(*make("simple_gla", 8, {{"num_heads", 2}, {"gate_fn", "sigmoid"}})),
              ElementsAre("g_norm.weight 4", "g_proj.weight 8 8", "gk_proj.bias 2",
                          "gk_proj.weight 2 8", "k_conv1d.weight 8 1 4", "k_proj.weight 8 8",
                          "o_proj.weight 8 8", "q_conv1d.weight 8 1 4", "q_proj.weight 8 8",
                          "v_conv1d.weight 8 1 4", "v_proj.weight 8 8"));
  EXPECT_THAT(parameters(*make("retention", 8, {{"num_heads", 2}})),
              ElementsAre("g_norm_swish_gate.weight 8", "g_proj.weight 16 8", "k_proj.weight 8 8",
                          "o_proj.weight 8 16", "q_proj.weight 8 8", "v_proj.weight 16 8"));
  EXPECT_THAT(parameters(*make("linear_attention", 8, {{"num_heads", 2}})),
              ElementsAre("feature_map_k.layer1.bias 4", "feature_map_k.layer1.weight 4 4",
                          "feature_map_k.layer2.bias 4", "feature_map_k.layer2.weight 4 4",
                          "feature_map_q.layer1.bias 4", "feature_map_q.layer1.weight 4 4",
                          "feature_map_q.layer2.bias 4", "feature_map_q.layer2.weight 4 4",
                          "k_proj.weight 8 8", "norm.weight 4", "o_proj.weight 8 8",
                          "q_proj.weight 8 8", "v_proj.weight 8 8"));
}

TEST(Family, Rwkv7HasFlasParameters) {
  const json options = {{"head_dim", 4},
                        {"decay_low_rank_dim", 3},
                        {"a_low_rank_dim", 2},
                        {"v_low_rank_dim", 5},
                        {"gate_low_rank_dim", 6}};
  const std::set<std::string> first = {"a_lora.lora.0.weight 2 8",
                                       "a_lora.lora.2.bias 8",
                                       "a_lora.lora.2.weight 8 2",
                                       "g_lora.lora.0.weight 6 8",
                                       "g_lora.lora.2.weight 8 6",
                                       "g_norm.bias 8",
                                       "g_norm.weight 8",
                                       "k_a 8",
                                       "k_k 8",
                                       "k_proj.weight 8 8",
                                       "o_proj.weight 8 8",
                                       "r_k 2 4",
                                       "r_proj.weight 8 8",
                                       "v_proj.weight 8 8",
                                       "w_lora.lora.0.weight 3 8",
                                       "w_lora.lora.2.bias 8",
                                       "w_lora.lora.2.weight 8 3",
                                       "x_a 1 1 8",
                                       "x_g 1 1 8",
                                       "x_k 1 1 8",
                                       "x_r 1 1 8",
                                       "x_v 1 1 8",
                                       "x_w 1 1 8"};
  EXPECT_EQ(parameters(*make("rwkv7", 8, options)), first);
  MixerArgs args;
  args.hidden_size = 8;
  args.layer_idx = 1;
  args.num_layers = 3;
  args.options = options;
  std::set<std::string> later = first;
  later.insert({"v_lora.lora.0.weight 5 8", "v_lora.lora.2.bias 8", "v_lora.lora.2.weight 8 5"});
  EXPECT_EQ(parameters(*make_mixer("rwkv7", args)), later);
}

TEST(Family, Rwkv7StartsAsItsPaperSays) {
  torch::manual_seed(8);
  MixerArgs args;
  args.hidden_size = 16;
  args.layer_idx = 1;
  args.num_layers = 3;
  args.options = {{"head_dim", 4}};
  const auto mixer = make_mixer("rwkv7", args);
  auto p = mixer->named_parameters();
  EXPECT_EQ(p["o_proj.weight"].abs().max().item<float>(), 0.0f);
  EXPECT_EQ(p["w_lora.lora.0.weight"].abs().max().item<float>(), 0.0f);
  const at::Tensor r = p["r_proj.weight"];
  EXPECT_TRUE(r.matmul(r.t()).allclose(at::eye(16), 1e-4, 1e-5));
  // The slowest channel of a head's middle forgets least; decays rise over the channels.
  const at::Tensor w = p["w_lora.lora.2.bias"];
  EXPECT_NEAR(w[0].item<float>(), -6 + 0.5 - 2.5, 1e-5);
  EXPECT_NEAR(w[15].item<float>(), 0 + 0.5 + 2.5, 1e-5);
  EXPECT_NEAR(p["x_r"].flatten()[4].item<float>(), 1 - std::pow(0.25, 0.2 * 2 / 3), 1e-5);
  EXPECT_NEAR(p["x_k"].flatten()[4].item<float>(), 1 - std::pow(0.25, 0.7 * 2 / 3), 1e-5);
  EXPECT_NEAR(p["g_norm.weight"][3].item<float>(), std::pow(2.0 / 3, 0.7), 1e-5);
  EXPECT_NEAR(p["k_k"][0].item<float>(), 0.76, 1e-5);
  EXPECT_NEAR(p["v_lora.lora.2.bias"][15].item<float>(), 0.73 - 0.2, 1e-5);
}

TEST(Family, Rwkv7MixesTheFirstLayersValueIn) {
  torch::manual_seed(8);
  c10::NoGradGuard no_grad;
  MixerArgs args;
  args.hidden_size = 8;
  args.layer_idx = 1;
  args.num_layers = 2;
  args.options = {{"head_dim", 4}};
  const auto mixer = make_mixer("rwkv7", args);
  auto p = mixer->named_parameters();
  p["o_proj.weight"].copy_(at::eye(8));
  const at::Tensor x = at::randn({2, 9, 8}), first = at::randn({2, 9, 8});
  try {
    mixer->forward(x, {});
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(),
                 "[rwkv7] layer 1 takes the first layer's value from Context::shared, which is "
                 "absent");
  }
  const auto run = [&](const at::Tensor& value) {
    Shared shared;
    shared.first_value = value;
    Context ctx;
    ctx.shared = &shared;
    const at::Tensor y = mixer->forward(x, ctx);
    if (value.defined()) {  // it stays the first one's
      EXPECT_TRUE(shared.first_value.equal(value));
    }
    EXPECT_TRUE(shared.first_value.defined());
    return y;
  };
  const at::Tensor own = run({}), mixed = run(first);
  EXPECT_GT((own - mixed).abs().max().item<float>(), 1e-3f);
  mixer->use_naive(true);
  EXPECT_TRUE(run(first).allclose(mixed, 1e-4, 1e-5));
  mixer->use_naive(false);
  // A gate of 0 leaves the layer's own value, one of 1 takes the first layer's instead.
  p["v_lora.lora.2.bias"].fill_(-1e4);
  EXPECT_TRUE(run(first).allclose(own, 1e-5, 1e-6));
  p["v_lora.lora.2.bias"].fill_(1e4);
  p["v_proj.weight"].zero_();
  EXPECT_GT(run(first).abs().max().item<float>(), 1e-3f);
}

TEST(Family, DecaysStartAsInFla) {
  torch::manual_seed(3);
  auto p =
      make("kimi_delta_attention", 64, {{"head_dim", 4}, {"num_heads", 64}})->named_parameters();
  const at::Tensor A = p["A_log"].exp(), dt = p["dt_bias"].exp().log1p();
  EXPECT_GE(A.min().item<float>(), 1.0f);
  EXPECT_LT(A.min().item<float>(), 3.0f);
  EXPECT_GT(A.max().item<float>(), 13.0f);
  EXPECT_LE(A.max().item<float>(), 16.0f);
  EXPECT_GE(dt.min().item<float>(), 0.00099f);
  EXPECT_LE(dt.max().item<float>(), 0.101f);
  p = make("kimi_delta_attention", 64, {{"safe_gate", true}})->named_parameters();
  EXPECT_EQ(p["A_log"].abs().max().item<float>(), 0.0f);
}

TEST(Family, KimiDeltaAttentionBearsStrongDecay) {
  // 64 tokens of decay exp(-100) each: products far below the smallest number of the dtype.
  c10::NoGradGuard no_grad;
  torch::manual_seed(4);
  const auto mixer = make("kimi_delta_attention", 16, {{"head_dim", 8}});
  mixer->named_parameters()["dt_bias"].fill_(100);
  mixer->named_parameters()["A_log"].fill_(0);
  const at::Tensor x = at::randn({1, 130, 16});
  const at::Tensor y = mixer->forward(x, {});
  EXPECT_TRUE(y.isfinite().all().item<bool>());
  mixer->use_naive(true);
  EXPECT_LE((mixer->forward(x, {}) - y).abs().max().item<float>(), 1e-5f);
}

TEST(Family, StatesHaveTheSizesOfTheFormula) {
  const auto bytes = [](const char* name, const json& options) {
    return make(name, 16, options)->zero_state(3, at::kFloat).bytes();
  };
  // 3 sequences of HV K V numbers, and of conv_size inputs per channel of q, k and v
  const int64_t matrix = 3 * 4 * 4 * 8 * 4, conv = 3 * (8 + 8 + 32) * 4 * 4;
  const json grouped = {{"head_dim", 4}, {"num_heads", 2}, {"num_v_heads", 4}, {"expand_v", 2.0}};
  EXPECT_EQ(bytes("kimi_delta_attention", grouped), matrix + conv);
  EXPECT_EQ(bytes("gated_delta_net_2", grouped), matrix + conv);
  EXPECT_EQ(bytes("gated_write", grouped), matrix + conv);
  EXPECT_EQ(bytes("dplr", grouped), matrix + conv);
  EXPECT_EQ(bytes("gated_delta_product", grouped), matrix + 3 * (8 + 16 + 64) * 4 * 4);
  EXPECT_EQ(bytes("retention", {{"num_heads", 2}}), 3 * (2 * 8 * 16 * 4 + 8));  // and a position
  EXPECT_EQ(bytes("gla", {{"num_heads", 2}}), 3 * 2 * 4 * 8 * 4);
  // the normaliser is one more value channel
  EXPECT_EQ(bytes("linear_attention",
                  {{"num_heads", 2}, {"feature_map", "elu"}, {"do_feature_map_norm", true}}),
            3 * 2 * 8 * 9 * 4);
}

TEST(Family, RandomFeaturesFollowTheLayer) {
  const json options = {{"feature_map", "performer"}, {"output_norm", "identity"}};
  const auto run = [&](int64_t layer) {
    torch::manual_seed(9);
    MixerArgs args;
    args.hidden_size = 8;
    args.layer_idx = layer;
    args.options = options;
    const auto mixer = make_mixer("linear_attention", args);
    return mixer->forward(at::randn({1, 5, 8}), {});
  };
  EXPECT_TRUE(run(0).equal(run(0)));
  EXPECT_FALSE(run(0).allclose(run(1)));
}

TEST(Family, RejectsWhatTheRecurrenceCannotDo) {
  EXPECT_EQ(usage_error("kimi_delta_attention", 8, {{"safe_gate", true}, {"lower_bound", 0.5}}),
            "[kimi_delta_attention] lower_bound must be in [-5,0), got 0.5");
  EXPECT_EQ(usage_error("gated_delta_net_2", 8, {{"lower_bound", 0.0}}),
            "[gated_delta_net_2] lower_bound must be in [-5,0), got 0");
  EXPECT_EQ(usage_error("dplr", 8, {{"safe_gate", true}, {"lower_bound", -6.0}}),
            "[dplr] lower_bound must be in [-5,0), got -6");
  EXPECT_EQ(usage_error("kimi_delta_attention", 8, {{"num_heads", 2}, {"num_v_heads", 3}}),
            "[kimi_delta_attention] num_v_heads must be a multiple of num_heads (2), got 3");
  EXPECT_EQ(usage_error("gated_delta_product", 8, {{"num_householder", 0}}),
            "[gated_delta_product] num_householder must be an integer of at least 1, got 0");
  EXPECT_EQ(usage_error("gla", 8, {{"num_heads", 4}, {"num_kv_heads", 3}}),
            "[gla] num_kv_heads must divide num_heads (4), got 3");
  EXPECT_EQ(usage_error("gla", 8, {{"gate_logit_normalizer", 0}}),
            "[gla] gate_logit_normalizer must be positive, got 0");
  EXPECT_EQ(usage_error("gla", 8, {{"clamp_min", 1.0}}),
            "[gla] clamp_min must not be positive, got 1");
  EXPECT_EQ(usage_error("gla", 7, {{"expand_k", 0.5}}),
            "[gla] hidden_size * expand_k must be a whole number of at least 1, got 7 * 0.5 = 3.5");
  EXPECT_EQ(usage_error("simple_gla", 8, {{"num_heads", 3}}),
            "[simple_gla] num_heads must divide the widths of keys and values (8 and 8), got 3");
  EXPECT_EQ(usage_error("retention", 6, {{"num_heads", 2}, {"rope_theta", 100.0}}),
            "[retention] rotary positions need keys of even size, got 3 (rope_theta = 0: no "
            "positions)");
  EXPECT_EQ(usage_error("linear_attention", 8, {{"do_feature_map_norm", true}}),
            "[linear_attention] do_feature_map_norm divides by a sum of features and needs a "
            "feature_map without negative values (elu, relu, performer), got "
            "\"elementwise_product\"");
  EXPECT_EQ(
      usage_error("linear_attention", 8, {{"feature_map", "identity"}, {"norm_k", true}}),
      "[linear_attention] norm_k divides by a sum of features and needs a feature_map without "
      "negative values (elu, relu, performer), got \"identity\"");
  EXPECT_EQ(usage_error("linear_attention", 8, {{"feature_map", "elu"}, {"num_features", 4}}),
            "[linear_attention] num_features is for feature_map \"performer\", got \"elu\"");
  EXPECT_EQ(usage_error("rwkv7", 12, {{"head_dim", 5}}),
            "[rwkv7] head_dim must divide hidden_size (12), got 5");
  EXPECT_EQ(usage_error("gated_write", 8, {{"qk_norm", "none"}, {"learning_rate", 1.5}}),
            "[gated_write] qk_norm \"none\" needs a learning_rate of at most 1, got 1.5 "
            "(allow_unstable = true to train it all the same)");
  EXPECT_EQ(
      usage_error("gated_write", 8, {{"learning_rate", 2.5}}),
      "[gated_write] learning_rate must be at most 2, got 2.5 (allow_unstable = true to train "
      "it all the same)");
  EXPECT_EQ(usage_error("gated_write", 8, {{"learning_rate", -1.0}, {"allow_unstable", true}}),
            "[gated_write] learning_rate must be positive, got -1");
  make("gated_write", 8,
       {{"qk_norm", "none"}, {"learning_rate", 3.0}, {"allow_unstable", true}});  // asked for
}

// The "[model.mixer]" lines of a README: option names and values.
json example_of(const std::string& mixer) {
  std::ifstream file(GDN_SOURCE_DIR "/gdn/mixers/" + mixer + "/README.md");
  json options;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line == "    [model.mixer]") {
      inside = true;
    } else if (inside && line.empty()) {
      break;
    } else if (inside) {
      const size_t equals = line.find(" = ");
      options[line.substr(4, equals - 4)] = json::parse(line.substr(equals + 3));
    }
  }
  return options;
}

TEST(Family, TheExamplesOfTheReadmesAreValid) {
  for (const char* mixer : {"gated_delta_net", "delta_net", "kimi_delta_attention",
                            "gated_delta_net_2", "gated_delta_product", "gated_write", "dplr",
                            "linear_attention", "retention", "simple_gla", "gla"}) {
    json options = example_of(mixer);
    ASSERT_EQ(options["name"], mixer);
    options.erase("name");
    EXPECT_GE(options.size(), 1u) << mixer;
    make(mixer, 128, options);
  }
}

// A beta above 1 times a long key would turn the erased direction over and make it longer with
// every token. gated_write refuses that pair of options; the others cannot be asked for it, as
// their keys always get length 1 (by qk_norm = "sum" at most that). Inputs a hundred times too
// large show it.
TEST(Family, KeysThatEraseHaveAtMostLengthOne) {
  c10::NoGradGuard no_grad;
  const json strong = {{"allow_neg_eigval", true}, {"use_short_conv", false}};
  json by_sum = strong;
  by_sum.update({{"qk_norm", "sum"}, {"qk_activation", "relu"}});
  const std::vector<std::pair<const char*, json>> cases = {
      {"delta_net", strong},
      {"delta_net", by_sum},
      {"gated_delta_net", strong},
      {"gated_delta_net_2", strong},
      {"gated_delta_product", strong},
      {"kimi_delta_attention", strong},
      {"dplr", {{"use_short_conv", false}}},
      {"gated_write", {{"use_short_conv", false}}},
      {"gated_write", {{"use_short_conv", false}, {"gate_shape", "key"}}},
      {"rwkv7", json::object()}};
  for (const auto& [name, options] : cases) {
    for (const bool naive : {false, true}) {
      torch::manual_seed(7);
      const auto mixer = make(name, 16, options);
      mixer->use_naive(naive);
      for (auto& p : mixer->named_parameters()) {  // nothing is forgotten
        if (p.key() == "A_log") p.value().fill_(-30);
      }
      State state = mixer->zero_state(1, at::kFloat);
      Context ctx;
      Shared shared;
      ctx.state = &state;
      ctx.shared = &shared;
      mixer->forward(at::randn({1, 100, 16}) * 100, ctx);
      const double largest = state["recurrent"].abs().max().item<double>();
      EXPECT_GT(largest, 1e-3) << name << options;
      EXPECT_LT(largest, 1e5) << name << options << " naive " << naive;
    }
  }
}

TEST(Family, FreeLowRankPartsKeepTheStateBounded) {
  // Without decay and with strong low-rank parts that point anywhere, an input that is over must
  // not be amplified: the transition's norm is at most 1.
  torch::manual_seed(6);
  c10::NoGradGuard no_grad;
  const auto mixer =
      make("dplr", 8, {{"head_dim", 4}, {"low_rank", "free"}, {"use_short_conv", false}});
  auto p = mixer->named_parameters();
  p["A_log"].fill_(-30);
  p["s_proj.bias"].fill_(2);
  State state = mixer->zero_state(1, at::kFloat);
  Context ctx;
  ctx.state = &state;
  mixer->forward(at::randn({1, 40, 8}), ctx);
  p["v_proj.weight"].zero_();
  const double before = state["recurrent"].norm().item<double>();
  ASSERT_GT(before, 0.01);
  mixer->forward(at::randn({1, 400, 8}) * 10, ctx);
  EXPECT_LE(state["recurrent"].norm().item<double>(), before);
}

}  // namespace
}  // namespace gdn
