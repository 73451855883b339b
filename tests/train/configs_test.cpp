// SPDX-License-Identifier: Apache-2.0
// Every file in configs/ makes a model that can be trained, shrunk so that a test can.
#include <ATen/ops/randint.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "gdn/model/causal_lm.h"
#include "gdn/train/config.h"

namespace gdn {
namespace {

using ::testing::ElementsAre;

std::vector<std::filesystem::path> config_files() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(GDN_SOURCE_DIR "/configs"))
    if (entry.path().extension() == ".toml") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

RunConfig load(const std::string& name) {
  return load_run_config(GDN_SOURCE_DIR "/configs/" + name + ".toml");
}

// One period of the hybrid, narrow, with few words.
ModelConfig shrunk(RunConfig run) {
  int64_t period = 0;
  for (const LayerPattern& layer : run.model.layers) period += layer.repeat;
  run.model.num_layers = std::max<int64_t>(period, 1);
  run.model.hidden_size = 96;
  run.model.intermediate_size = 32;
  run.model.vocab_size = 0;
  return make_model_config(run, 50);
}

TEST(Configs, EveryFileMakesATrainableModel) {
  const auto files = config_files();
  ASSERT_GE(files.size(), 10u);
  for (const auto& file : files) {
    SCOPED_TRACE(file.filename().string());
    const RunConfig run = load_run_config(file.string());
    EXPECT_EQ(parse_run_config(to_toml(run), "copy"), run);
    torch::manual_seed(1);
    CausalLM model(shrunk(run));
    const at::Tensor ids = at::randint(50, {1, 24}, at::kLong);
    const at::Tensor loss = model.loss(ids, at::randint(50, {1, 24}, at::kLong));
    EXPECT_NEAR(loss.item<double>(), std::log(50.0), 1.5);
    loss.backward();
    for (const auto& p : model.named_parameters()) {
      // An expert that no token took has none.
      if (!p.value().grad().defined()) {
        EXPECT_NE(p.key().find(".experts."), std::string::npos) << p.key();
        continue;
      }
      EXPECT_TRUE(p.value().grad().isfinite().all().item<bool>()) << p.key();
    }
    // config.json says the same model again.
    EXPECT_EQ(to_json(model_config_from_json(to_json(model.config()))), to_json(model.config()));
  }
}

// The mixers of one period.
std::vector<std::string> order(const std::string& name) {
  std::vector<std::string> mixers;
  for (const LayerPattern& layer : load(name).model.layers)
    mixers.insert(mixers.end(), static_cast<size_t>(layer.repeat), layer.mixer.name);
  return mixers;
}

TEST(Configs, HybridsHaveTheOrderOfTheirPapers) {
  EXPECT_THAT(order("h1"), ElementsAre("gated_delta_net", "attention"));
  EXPECT_THAT(order("h2"), ElementsAre("mamba2", "gated_delta_net", "attention"));
  EXPECT_THAT(order("qwen_3to1"), ElementsAre("gated_delta_net", "gated_delta_net",
                                              "gated_delta_net", "gated_attention"));
  EXPECT_THAT(order("kimi_3to1"), ElementsAre("kimi_delta_attention", "kimi_delta_attention",
                                              "kimi_delta_attention", "mla"));
  EXPECT_THAT(order("samba"), ElementsAre("mamba", "attention"));
  for (const char* name : {"h1", "h2", "samba"})  // the attention there is a sliding window
    EXPECT_EQ(load(name).model.layers.back().mixer.options["window_size"], 2048) << name;
  EXPECT_EQ(load("transformer_pp").model.mixer.name, "attention");
}

}  // namespace
}  // namespace gdn
