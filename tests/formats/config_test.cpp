// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using ::testing::ThrowsMessage;

void expect_rejected(const json& config, const std::string& what) {
  EXPECT_THAT([&] { model_config_from_json(config); },
              ThrowsMessage<UsageError>(AllOf(StartsWith("[config] "), HasSubstr(what))))
      << config.dump();
}

// What fla's GatedDeltaNetConfig writes, shortened.
json fla_config() {
  return json::parse(R"({
    "model_type": "gated_deltanet", "architectures": ["GatedDeltaNetForCausalLM"], "attn_mode": "chunk",
    "hidden_size": 1024, "expand_v": 2, "use_gate": true, "use_short_conv": true, "conv_size": 4, "head_dim": 256,
    "num_heads": 3, "hidden_ratio": 4, "intermediate_size": null, "hidden_act": "swish", "num_hidden_layers": 4,
    "norm_eps": 1e-06, "attn": {"layers": [1, 3], "num_heads": 8, "window_size": 512}, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": null, "tie_word_embeddings": true, "initializer_range": 0.006,
    "fuse_cross_entropy": true, "vocab_size": 32000, "torch_dtype": "bfloat16", "transformers_version": "4.48.0"})");
}

TEST(ModelConfig, ReadsFlaForm) {
  const ModelConfig config = model_config_from_json(fla_config());
  EXPECT_EQ(config.hidden_size, 1024);
  EXPECT_EQ(config.ffn_size(), 2816);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.initializer_range, 0.006);
  EXPECT_EQ(config.eos_token_id, 2);
  EXPECT_FALSE(config.pad_token_id.has_value());
  ASSERT_EQ(config.blocks.size(), 4u);
  EXPECT_EQ(config.blocks[0].mixer, "gated_delta_net");
  EXPECT_EQ(config.blocks[0].mixer_options["num_heads"], 3);
  EXPECT_EQ(config.blocks[0].mixer_options["allow_neg_eigval"], false);
  EXPECT_EQ(config.blocks[3].mixer, "attention");
  EXPECT_EQ(config.blocks[3].mixer_options["window_size"], 512);
  EXPECT_EQ(config.blocks[3].mixer_options["rope_theta"], 10000.0);
}

TEST(ModelConfig, FlaFormRoundTrips) {
  const ModelConfig config = model_config_from_json(fla_config());
  const json written = to_json(config);
  EXPECT_EQ(written["model_type"], "gated_deltanet");
  EXPECT_EQ(written["architectures"], json({"GatedDeltaNetForCausalLM"}));
  EXPECT_EQ(written["num_hidden_layers"], 4);
  EXPECT_EQ(written["attn"]["layers"], json({1, 3}));
  EXPECT_EQ(written["attn"]["num_kv_heads"], 8);  // written out, as fla does
  json given = fla_config();
  given["attn"]["num_kv_heads"] = 8;
  EXPECT_EQ(model_config_from_json(written), model_config_from_json(given));

  json delta = {{"model_type", "delta_net"}, {"hidden_size", 512}, {"num_heads", 4}};
  const ModelConfig delta_net = model_config_from_json(delta);
  EXPECT_EQ(delta_net.blocks.size(), 24u);
  EXPECT_EQ(delta_net.blocks[0].mixer, "delta_net");
  EXPECT_EQ(delta_net.blocks[0].mixer_options["qk_norm"], "l2");
  EXPECT_EQ(to_json(delta_net)["model_type"], "delta_net");
  EXPECT_EQ(model_config_from_json(to_json(delta_net)), delta_net);
  delta["allow_neg_eigval"] = true;
  const json negative = to_json(model_config_from_json(delta));
  EXPECT_EQ(negative["allow_neg_eigval"], true);
  EXPECT_EQ(model_config_from_json(negative).blocks[0].mixer_options["allow_neg_eigval"], true);
}

TEST(ModelConfig, ReadsAndWritesKda) {
  json given = {{"model_type", "kda"}, {"hidden_size", 512}, {"num_heads", 4}, {"head_dim", 64}};
  const ModelConfig plain = model_config_from_json(given);
  EXPECT_EQ(plain.blocks.size(), 24u);
  EXPECT_EQ(plain.blocks[0].mixer, "kimi_delta_attention");
  EXPECT_EQ(plain.blocks[0].mixer_options["head_dim"], 64);
  EXPECT_EQ(plain.blocks[0].mixer_options["safe_gate"], false);
  json written = to_json(plain);
  EXPECT_EQ(written["model_type"], "kda");
  EXPECT_EQ(written["architectures"], json({"KDAForCausalLM"}));
  EXPECT_TRUE(written["lower_bound"].is_null());
  EXPECT_EQ(model_config_from_json(written), plain);
  // As the mixer fills in the option: a bound that is not used stays unsaid.
  ModelConfig resolved = plain;
  for (BlockConfig& block : resolved.blocks) block.mixer_options["lower_bound"] = -5.0;
  EXPECT_TRUE(to_json(resolved)["lower_bound"].is_null());
  // fla applies a bound wherever one is given.
  given["lower_bound"] = -4.0;
  const ModelConfig bounded = model_config_from_json(given);
  EXPECT_EQ(bounded.blocks[0].mixer_options["safe_gate"], true);
  written = to_json(bounded);
  EXPECT_EQ(written["lower_bound"], -4.0);
  EXPECT_EQ(written["safe_gate"], true);
  EXPECT_EQ(model_config_from_json(written), bounded);
  expect_rejected({{"model_type", "kda"}, {"safe_gate", true}}, "safe_gate needs lower_bound");
}

TEST(ModelConfig, ReadsGlaAndWritesItInOurForm) {
  const ModelConfig gla = model_config_from_json(
      {{"model_type", "gla"}, {"num_hidden_layers", 2}, {"feature_map", nullptr}});
  EXPECT_EQ(gla.blocks.size(), 2u);
  EXPECT_EQ(gla.blocks[0].mixer, "gla");
  EXPECT_EQ(gla.blocks[0].mixer_options["feature_map"], "identity");
  EXPECT_EQ(gla.blocks[0].mixer_options["expand_k"], 0.5);
  EXPECT_EQ(to_json(gla)["model_type"], "gdn");
  EXPECT_EQ(model_config_from_json(to_json(gla)).blocks, gla.blocks);
  for (const char* text :
       {R"({"use_gv": true})", R"({"use_gk": false})", R"({"elementwise_affine": false})"}) {
    json given = json::parse(text);
    const std::string key = given.begin().key();
    given["model_type"] = "gla";
    expect_rejected(given, key + (given[key] == true ? " true" : " false") + " is not supported");
  }
}

TEST(ModelConfig, DifferentAttentionLayersAreAList) {
  json given = fla_config();
  given["attn"] = json::parse(
      R"([{"layers": [0], "num_heads": 8, "num_kv_heads": 2}, {"layers": [2], "num_heads": 4}])");
  const ModelConfig config = model_config_from_json(given);
  EXPECT_EQ(config.blocks[0].mixer_options["num_kv_heads"], 2);
  EXPECT_EQ(config.blocks[2].mixer_options["num_heads"], 4);
  const json written = to_json(config);
  ASSERT_TRUE(written["attn"].is_array());
  EXPECT_EQ(written["attn"].size(), 2u);
}

// Each of these has no field in fla's form, so the model must be written in ours, and come back
// unchanged.
TEST(ModelConfig, WhatFlaCannotSayIsWrittenInOurForm) {
  const ModelConfig fla = model_config_from_json(fla_config());
  const auto check = [&](auto change) {
    ModelConfig config = model_config_from_json(to_json(fla));
    change(config);
    const json written = to_json(config);
    EXPECT_EQ(written["model_type"], "gdn");
    EXPECT_EQ(model_config_from_json(written), config);
    EXPECT_FALSE(config == fla);
  };
  check([](ModelConfig& c) { c.blocks[0].norm_place = NormPlace::kPost; });
  check([](ModelConfig& c) { c.blocks[0].residual_scale = 0.5; });
  check([](ModelConfig& c) { c.blocks[0].feed_forward = ""; });
  check([](ModelConfig& c) { c.blocks[0].mixer = ""; });
  check([](ModelConfig& c) { c.blocks[0].mixer = "mamba2"; });
  check([](ModelConfig& c) { c.blocks[1].mixer = "delta_net"; });
  check([](ModelConfig& c) { c.blocks[0].feed_forward_options = {{"intermediate_size", 64}}; });
  check([](ModelConfig& c) { c.blocks[0].mixer_options["num_heads"] = 4; });  // unlike block 2
  check([](ModelConfig& c) {
    c.blocks[0].mixer_options.erase("head_dim");
  });  // fla's default might differ
  check([](ModelConfig& c) {
    for (BlockConfig& block : c.blocks) block.mixer_options["conv_bias"] = true;
  });
  check([](ModelConfig& c) { c.blocks = {c.blocks[1], c.blocks[1]}; });  // attention alone
}

TEST(ModelConfig, OptionsThatAreOffNeedNoField) {
  ModelConfig config = model_config_from_json(fla_config());
  for (BlockConfig& block : config.blocks) block.mixer_options["conv_bias"] = false;
  EXPECT_EQ(to_json(config)["model_type"], "gated_deltanet");
}

TEST(ModelConfig, RejectsBadFields) {
  const auto with = [](const char* key, json value) {
    json config = fla_config();
    config[key] = std::move(value);
    return config;
  };
  expect_rejected(json::array(), "must be an object");
  expect_rejected(with("model_type", "gated_deltant"), "did you mean \"gated_deltanet\"?");
  expect_rejected(with("hidden_size", 0), "hidden_size must be in [1, ");
  expect_rejected(with("hidden_size", 1.5), "hidden_size must be an integer, got 1.5");
  expect_rejected(with("hidden_size", "1024"), "hidden_size must be an integer");
  expect_rejected(with("hidden_size", uint64_t{1} << 63), "hidden_size must be an integer");
  expect_rejected(with("vocab_size", int64_t{1} << 40), "vocab_size");
  expect_rejected(with("num_hidden_layers", 1000000000), "num_hidden_layers");
  expect_rejected(with("norm_eps", 0), "norm_eps must be positive");
  expect_rejected(with("initializer_range", -0.1), "initializer_range");
  expect_rejected(with("tie_word_embeddings", 1), "true or false");
  expect_rejected(with("eos_token_id", -2), "eos_token_id");
  expect_rejected(with("hidden_act", "gelu"), "hidden_act");
  expect_rejected(with("attnres_block_size", 4), "attention residuals");
  expect_rejected(with("intermediate_size", -1), "intermediate_size");
  expect_rejected(with("attn", 3), "attn must be an object");
  expect_rejected(with("attn", {{"layers", {4}}, {"num_heads", 1}}),
                  "layers must lie in [0, 4), got 4");
  expect_rejected(with("attn", {{"layers", {-1}}, {"num_heads", 1}}), "got -1");
  expect_rejected(with("attn", {{"layers", {1, 1}}, {"num_heads", 1}}), "layer 1 is named twice");
  expect_rejected(with("attn", {{"layers", {1}}}), "num_heads");
  expect_rejected(with("attn", {{"num_heads", 1}}), "layers is missing");
  expect_rejected(with("attn", {{"layers", {1}}, {"num_heads", 1}, {"window", 3}}),
                  "unknown key \"window\"");
}

TEST(ModelConfig, RejectsBadBlocks) {
  const json good = {
      {"model_type", "gdn"}, {"vocab_size", 8}, {"hidden_size", 16}, {"blocks", {json::object()}}};
  EXPECT_EQ(model_config_from_json(good).blocks[0], BlockConfig());
  EXPECT_FALSE(model_config_from_json(good).eos_token_id.has_value());
  const auto with_block = [&](json block) {
    json config = good;
    config["blocks"] = {std::move(block)};
    return config;
  };
  json config = good;
  config["hidden_sizes"] = 3;
  expect_rejected(config, "unknown key \"hidden_sizes\" (did you mean \"hidden_size\"?)");
  config = good;
  config.erase("blocks");
  expect_rejected(config, "blocks is missing");
  config["blocks"] = json::array();
  expect_rejected(config, "at least one block");
  expect_rejected(with_block({{"mixr", "x"}}),
                  "blocks[0]: unknown key \"mixr\" (did you mean \"mixer\"?)");
  expect_rejected(with_block({{"mixer_options", 3}}), "mixer_options must be an object");
  expect_rejected(with_block({{"norm_place", "mid"}}), "norm_place");
  expect_rejected(with_block({{"feed_forward", "moa"}}), "unknown feed_forward \"moa\"");
  expect_rejected(with_block({{"feed_forward_options", {{"inter", 3}}}}), "unknown key \"inter\"");
  expect_rejected(with_block({{"feed_forward_options", {{"intermediate_size", 0}}}}),
                  "intermediate_size");
  expect_rejected(
      with_block({{"feed_forward", ""}, {"feed_forward_options", {{"intermediate_size", 8}}}}),
      "without a feed_forward");
}

TEST(ModelConfig, FeedForwardSizeIsFlas) {
  ModelConfig config;
  config.hidden_size = 2048;
  EXPECT_EQ(config.ffn_size(), 5632);
  config.hidden_size = 192;
  EXPECT_EQ(config.ffn_size(), 512);
  config.intermediate_size = 100;
  EXPECT_EQ(config.ffn_size(), 100);
}

}  // namespace
}  // namespace gdn
