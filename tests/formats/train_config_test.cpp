// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <set>

#include "gdn/base/check.h"
#include "gdn/train/config.h"

namespace gdn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), ::testing::Not(HasSubstr("\n")));
    return e.what();
  } catch (const std::exception& e) {
    return std::string("not a UsageError: ") + e.what();
  }
  return "no error";
}

RunConfig parse(const std::string& text) { return parse_run_config(text, "run.toml"); }

TEST(RunConfig, ReadsEverySection) {
  const RunConfig c = parse(R"(
[model]
hidden_size = 192
num_layers = 3
tie_word_embeddings = true
mixer = { name = "delta_net", num_heads = 3, expand_v = 1.5, allow_neg_eigval = true }
[data]
path = "x.txt"
batch_size = 4
[train]
lr = 2e-3
max_iters = 1e4
dtype = "bf16"
)");
  EXPECT_EQ(c.model.hidden_size, 192);
  EXPECT_TRUE(c.model.tie_word_embeddings);
  EXPECT_EQ(c.model.mixer.name, "delta_net");
  EXPECT_EQ(c.model.mixer.options,
            (nlohmann::json{{"num_heads", 3}, {"expand_v", 1.5}, {"allow_neg_eigval", true}}));
  EXPECT_EQ(c.data.path, "x.txt");
  EXPECT_EQ(c.data.batch_size, 4);
  EXPECT_EQ(c.data.seq_len, RunConfig().data.seq_len);
  EXPECT_DOUBLE_EQ(c.train.lr, 2e-3);
  EXPECT_EQ(c.train.max_iters, 10000);
  EXPECT_EQ(c.train.dtype, "bf16");
}

TEST(RunConfig, UnknownKeysNameFileKeyAndTheNearest) {
  EXPECT_EQ(
      error_of([] { parse("[data]\nbatchsize = 3\n"); }),
      "[config] run.toml: unknown key \"batchsize\" in [data] (did you mean \"batch_size\"?)");
  EXPECT_EQ(error_of([] { parse("[train]\nbatch_size = 3\n"); }),
            "[config] run.toml: unknown key \"batch_size\" in [train] (it belongs into [data])");
  EXPECT_EQ(error_of([] { parse("[trian]\nlr = 3\n"); }),
            "[config] run.toml: unknown key \"trian\" (did you mean \"train\"?)");
  EXPECT_EQ(error_of([] { parse("lr = 3\n"); }),
            "[config] run.toml: unknown key \"lr\" (\"lr\" belongs into [train])");
  EXPECT_THAT(error_of([] { parse("[[model.layers]]\nmixr = \"attention\"\n"); }),
              HasSubstr("unknown key \"mixr\" (did you mean \"mixer\"?)"));
}

TEST(RunConfig, WrongTypesAndRangesAreNamed) {
  EXPECT_EQ(error_of([] { parse("[train]\nlr = \"fast\"\n"); }),
            "[config] run.toml: train.lr must be a number, got \"fast\"");
  EXPECT_EQ(error_of([] { parse("[train]\nmax_iters = 1.5\n"); }),
            "[config] run.toml: train.max_iters must be a whole number, got 1.5");
  EXPECT_EQ(error_of([] { parse("[data]\nbatch_size = 0\n"); }),
            "[config] run.toml: data.batch_size must be from 1 to 1048576, got 0");
  EXPECT_EQ(error_of([] { parse("[train]\nlr = nan\n"); }),
            "[config] run.toml: train.lr must be a finite number");
  EXPECT_EQ(
      error_of([] { parse("[train]\ndtype = \"fp23\"\n"); }),
      "[config] run.toml: train.dtype must be one of fp32, bf16, auto, got \"fp23\" (did you mean "
      "\"fp32\"?)");
  EXPECT_THAT(error_of([] { parse("[model]\nmixer = 3\n"); }), HasSubstr("model.mixer must be"));
  EXPECT_THAT(error_of([] { parse("[model]\nlayers = 3\n"); }), HasSubstr("must be a list"));
  EXPECT_THAT(error_of([] { parse("[[model.layers]]\nrepeat = 0\n"); }),
              HasSubstr("layers.repeat must be"));
  EXPECT_THAT(error_of([] { parse("model = 3\n"); }), HasSubstr("[model] must be a table"));
  EXPECT_THAT(error_of([] { parse("[train]\nseed = 2020-01-01\n"); }), HasSubstr("not a date"));
  EXPECT_THAT(error_of([] { parse("[train\n"); }), HasSubstr("run.toml:1: not TOML"));
  EXPECT_THAT(error_of([] { parse("[train]\nlr = 1\nlr = 2\n"); }),
              HasSubstr("run.toml:3: not TOML"));
  EXPECT_THAT(error_of([] { load_run_config("/nonexistent/x.toml"); }),
              HasSubstr("/nonexistent/x.toml"));
}

// A value other than the default for every field, so that a field forgotten in saving shows.
RunConfig strange() {
  RunConfig c;
  for (const ConfigField& f : config_fields(c)) {
    if (auto* p = std::get_if<int64_t*>(&f.value)) {
      **p = **p + 1;
    } else if (auto* p = std::get_if<double*>(&f.value)) {
      **p = **p / 3 + 1e-9;
    } else if (auto* p = std::get_if<bool*>(&f.value)) {
      **p = !**p;
    } else {
      std::string& s = *std::get<std::string*>(f.value);
      s = f.choices.empty() ? "a \"b\"\\\n\x7f\x01 \xc3\xa9" : f.choices.back();
    }
  }
  c.model.mixer = {"m", {{"a", 1}, {"b", 2.0}, {"c d", {1, 2}}, {"e", "x"}, {"f", false}}};
  c.model.layers = {{{"attention", {{"window_size", 7}}}, "none", "post", 2},
                    {{"none"}, "", "", 1}};
  return c;
}

TEST(RunConfig, SavingAndReadingGivesTheSame) {
  EXPECT_EQ(parse(to_toml(RunConfig())), RunConfig());
  EXPECT_EQ(parse(to_toml(strange())), strange());
}

TEST(RunConfig, FlagsAndVariablesAreUniqueAndRoundTrip) {
  RunConfig source = strange(), target;
  const auto from = config_fields(source);
  const auto to = config_fields(target);
  std::set<std::string> flags;
  for (size_t i = 0; i < from.size(); ++i) {
    EXPECT_TRUE(flags.insert(from[i].flag).second) << from[i].flag;
    EXPECT_EQ(from[i].flag.find('_'), std::string::npos);
    EXPECT_FALSE(from[i].help.empty());
    std::string text = from[i].text();
    if (auto* p = std::get_if<std::string*>(&from[i].value)) text = **p;
    to[i].set_text(text, "--" + from[i].flag);
  }
  target.model.mixer = source.model.mixer;
  target.model.layers = source.model.layers;
  EXPECT_EQ(target, source);
}

TEST(RunConfig, VariablesOverrideFiles) {
  RunConfig c = parse("[train]\nlr = 0.5\n[data]\nbatch_size = 2\n");
  setenv("GDN_LR", "0.25", 1);
  setenv("GDN_DATA", "y.txt", 1);
  apply_environment(c);
  EXPECT_DOUBLE_EQ(c.train.lr, 0.25);
  EXPECT_EQ(c.data.path, "y.txt");
  EXPECT_EQ(c.data.batch_size, 2);
  setenv("GDN_LR", "quick", 1);
  EXPECT_EQ(error_of([&] { apply_environment(c); }),
            "[config] GDN_LR must be a number, got \"quick\"");
  unsetenv("GDN_LR");
  unsetenv("GDN_DATA");
}

TEST(RunConfig, TextIsParsedStrictly) {
  RunConfig c;
  const auto field = [&](const std::string& key) {
    for (const ConfigField& f : config_fields(c))
      if (f.key == key) return f;
    throw std::runtime_error(key);
  };
  field("tie_word_embeddings").set_text("Yes", "--x");
  EXPECT_TRUE(c.model.tie_word_embeddings);
  field("tie_word_embeddings").set_text("0", "--x");
  EXPECT_FALSE(c.model.tie_word_embeddings);
  for (const char* bad : {"", "3x", "--", " 3", "0x10", "1e400"})
    EXPECT_THAT(error_of([&] { field("batch_size").set_text(bad, "--b"); }),
                HasSubstr("--b must be"));
  EXPECT_THAT(error_of([&] { field("tie_word_embeddings").set_text("maybe", "--t"); }),
              HasSubstr("--t must be true or false"));
}

TEST(RunConfig, ReplacingTheMixerKeepsSharedOptions) {
  RunConfig c = parse(R"(
[model]
mixer = { name = "gated_delta_net", num_heads = 3, expand_v = 2.0 }
[[model.layers]]
[[model.layers]]
mixer = { name = "attention", num_heads = 6, window_size = 9 }
[[model.layers]]
mixer = "none"
)");
  EXPECT_EQ(c.model.layers[0].mixer.options["num_heads"], 3) << "an entry leans on [model.mixer]";
  replace_mixer(c, "delta_net", {"num_heads", "expand_v", "head_dim"});
  EXPECT_EQ(c.model.mixer, (MixerChoice{"delta_net", {{"num_heads", 3}, {"expand_v", 2.0}}}));
  EXPECT_EQ(c.model.layers[1].mixer, (MixerChoice{"delta_net", {{"num_heads", 6}}}));
  EXPECT_EQ(c.model.layers[2].mixer.name, "none");
}

TEST(RunConfig, MixerOptions) {
  RunConfig c = parse("[model]\nmixer = \"delta_net\"\n[[model.layers]]\nmixer = \"attention\"\n");
  set_mixer_option(c, "num_heads=4");
  set_mixer_option(c, "attention.window_size=16");
  set_mixer_option(c, "mode=chunk");
  EXPECT_EQ(c.model.mixer.options, (nlohmann::json{{"num_heads", 4}, {"mode", "chunk"}}));
  EXPECT_EQ(c.model.layers[0].mixer.options,
            (nlohmann::json{{"num_heads", 4}, {"window_size", 16}, {"mode", "chunk"}}));
  EXPECT_THAT(error_of([&] { set_mixer_option(c, "num_heads"); }), HasSubstr("OPTION=VALUE"));
  EXPECT_THAT(error_of([&] { set_mixer_option(c, "mamba.x=1"); }), HasSubstr("no layer uses"));
}

TEST(RunConfig, BlocksOfAHybrid) {
  RunConfig c = parse(R"(
[model]
num_layers = 7
feed_forward = "swiglu"
residual_scale = 0.5
[[model.layers]]
mixer = { name = "gated_delta_net", num_heads = 2 }
repeat = 2
[[model.layers]]
mixer = "attention"
feed_forward = "none"
norm_place = "post"
)");
  const ModelConfig m = make_model_config(c, 256, 7);
  ASSERT_EQ(m.blocks.size(), 7u);
  std::string order;
  for (const BlockConfig& b : m.blocks) order += b.mixer[0];
  EXPECT_EQ(order, "ggaggag");
  EXPECT_EQ(m.blocks[3].mixer_options["num_heads"], 2);
  EXPECT_EQ(m.blocks[2].feed_forward, "");
  EXPECT_EQ(m.blocks[3].feed_forward, "swiglu");
  EXPECT_EQ(m.blocks[2].norm_place, NormPlace::kPost);
  EXPECT_EQ(m.blocks[3].norm_place, NormPlace::kPre);
  EXPECT_DOUBLE_EQ(m.blocks[6].residual_scale, 0.5);
  EXPECT_EQ(m.vocab_size, 256);
  EXPECT_EQ(m.eos_token_id, 7);
  c.model.vocab_size = 100;
  EXPECT_THAT(error_of([&] { make_model_config(c, 256); }),
              HasSubstr("at least the tokenizer's 256, got 100"));
}

TEST(RunConfig, NumbersAreFinite) {
  for (const char* text : {"[model.mixer]\nexpand_v = nan", "[train]\nlr = inf"}) {
    EXPECT_THAT(error_of([&] { parse_run_config(text, "run.toml"); }),
                AllOf(HasSubstr("run.toml: "), HasSubstr("must be a finite number")));
  }
}

// Where the TOML library itself needs care, see gdn/train/toml.h.
TEST(RunConfig, BrokenTomlIsAnError) {
  for (const char* text :
       {"[\nmodel]", "[train]\n\u00e9 = 1", "[train]\nlr = \"\"\"\\\n \u00e9\"\"\""}) {
    EXPECT_THAT(error_of([&] { parse_run_config(text, "run.toml"); }), HasSubstr("run.toml"));
  }
}

TEST(RunConfig, RulesAcrossFields) {
  RunConfig c;
  EXPECT_THAT(error_of([&] { validate(c); }), HasSubstr("--data FILE"));
  c.data.path = "x";
  validate(c);
  c.train.min_lr = 1;
  EXPECT_THAT(error_of([&] { validate(c); }), HasSubstr("train.min_lr"));
}

TEST(RunConfig, TheRepositorysConfigsAreValid) {
  int found = 0;
  for (const auto& entry : std::filesystem::directory_iterator(GDN_SOURCE_DIR "/configs")) {
    if (entry.path().extension() != ".toml") continue;
    ++found;
    RunConfig c = load_run_config(entry.path().string());
    if (c.data.kind == "text" && c.data.path.empty()) c.data.path = "given by --data";
    EXPECT_EQ(error_of([&] { validate(c); }), "no error") << entry.path();
    EXPECT_EQ(error_of([&] { make_model_config(c, 256); }), "no error") << entry.path();
  }
  EXPECT_GE(found, 5);
}

}  // namespace
}  // namespace gdn
