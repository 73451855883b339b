// SPDX-License-Identifier: Apache-2.0
// gdn generate and gdn info on a model folder.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "gdn/base/file.h"
#include "gdn/model/checkpoint.h"
#include "tests/cli/support.h"
#include "tests/model/support.h"

namespace gdn {
namespace {

using cli_testing::call;
using cli_testing::Result;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class Generate : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::seed(5);
    ModelConfig config = testing::tiny_config({testing::gdn_block(), testing::attention_block()});
    config.vocab_size = 256;
    const CausalLM model(config);
    save_model(folder_.path(), model, make_byte_tokenizer().get());
    parameters_ = 0;
    for (const auto& p : model.parameters()) parameters_ += p.numel();
  }
  testing::TempFolder folder_;
  int64_t parameters_ = 0;
};

TEST_F(Generate, JsonHoldsPromptIdsIdsAndText) {
  const Result result = call(
      {"generate", "--model", folder_.path(), "--prompt", "Hi", "--max-new-tokens", "6", "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  const json out = json::parse(result.out);
  EXPECT_EQ(out["prompt_ids"], json({72, 105}));
  EXPECT_EQ(out["ids"].size(), 6u);
  EXPECT_TRUE(out["text"].is_string());
  EXPECT_EQ(out["finish_reason"], "length");
  EXPECT_THAT(result.err, HasSubstr("tok/s"));
  EXPECT_THAT(result.err, HasSubstr("first token after"));
  EXPECT_THAT(result.err, HasSubstr("state "));
  const Result ids = call({"generate", "-m", folder_.path(), "--prompt_ids", "72, 105",
                           "--max_new_tokens=6", "--json", "-q"});
  EXPECT_EQ(ids.out, result.out);
  EXPECT_EQ(ids.err, "");
}

TEST_F(Generate, TextStreamsToStdout) {
  const Result text =
      call({"generate", "-m", folder_.path(), "-p", "Hi", "-n", "6", "--greedy", "-q"});
  ASSERT_EQ(text.status, 0) << text.err;
  const Result as_json =
      call({"generate", "-m", folder_.path(), "-p", "Hi", "-n", "6", "-t", "0", "-q", "--json"});
  const json out = json::parse(as_json.out);
  EXPECT_EQ(text.out, out["text"].get<std::string>() + "\n");
  atomic_write_file(folder_ / "prompt.txt", "Hi");
  const Result echo = call({"generate", "-m", folder_.path(), "-f", folder_ / "prompt.txt", "-n",
                            "6", "--greedy", "-q", "--echo"});
  EXPECT_EQ(echo.out, "Hi" + text.out);
}

TEST_F(Generate, SamplesDifferAndSeedsRepeat) {
  const auto run = [&](const char* seed) {
    return call({"generate", "-m", folder_.path(), "-p", "Hi", "-n", "12", "--json", "-q",
                 "--num-samples", "2", "--temperature", "2", "--seed", seed})
        .out;
  };
  const std::string first = run("3");
  EXPECT_EQ(run("3"), first);
  EXPECT_NE(run("4"), first);
  std::istringstream lines(first);
  std::string a, b;
  std::getline(lines, a);
  std::getline(lines, b);
  EXPECT_NE(json::parse(a)["ids"], json::parse(b)["ids"]);
}

TEST_F(Generate, TheModelsOwnSettingsAreDefaults) {
  atomic_write_file(folder_ / "generation_config.json",
                    R"({"max_new_tokens": 3, "do_sample": false})");
  const Result own = call({"generate", "-m", folder_.path(), "-p", "Hi", "--json", "-q"});
  const Result flags =
      call({"generate", "-m", folder_.path(), "-p", "Hi", "--json", "-q", "-n", "3", "--greedy"});
  EXPECT_EQ(json::parse(own.out)["ids"].size(), 3u);
  EXPECT_EQ(own.out, flags.out);
  atomic_write_file(folder_ / "generation_config.json", R"({"max_new_tokens": "many"})");
  EXPECT_EQ(call({"generate", "-m", folder_.path(), "-p", "Hi"}).status, 1);
}

TEST_F(Generate, AnotherDtypeGivesText) {
  const Result result =
      call({"generate", "-m", folder_.path(), "-p", "Hi", "-n", "4", "--dtype", "bf16", "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(json::parse(result.out)["ids"].size(), 4u);
}

TEST_F(Generate, BadInputEndsInOneLine) {
  const auto expect = [](std::initializer_list<std::string> words, int status,
                         const std::string& what) {
    const Result result = call(words);
    EXPECT_EQ(result.status, status) << what;
    EXPECT_EQ(result.out, "");
    EXPECT_THAT(result.err, StartsWith("gdn: error: "));
    EXPECT_THAT(result.err, HasSubstr(what));
  };
  const std::string& model = folder_.path();
  expect({"generate", "-p", "x"}, 2, "--model is required");
  expect({"generate", "-m", model, "-p", "x", "--prompt-ids", "1"}, 2, "excludes");
  expect({"generate", "-m", model, "--prompt-ids", "1,x"}, 2, "token ids separated by commas");
  expect({"generate", "-m", model, "--prompt-ids", "1,,2"}, 2, "token ids separated by commas");
  expect({"generate", "-m", model, "--prompt-ids", "999"}, 1, "outside the vocabulary");
  expect({"generate", "-m", model, "-p", "x", "--top-p", "3"}, 2, "top_p must be in (0, 1]");
  expect({"generate", "-m", model, "-p", "x", "--dtype", "int8"}, 2, "--dtype");
  expect({"generate", "-m", model, "-p", "x", "--temprature", "1"}, 2,
         "did you mean \"--temperature\"?");
  expect({"generate", "-m", model + "/none", "-p", "x"}, 1, "there is no model folder");
  expect({"generate", "-m", model, "-f", model + "/none.txt"}, 1, "No such file");
  std::filesystem::resize_file(folder_ / "model.safetensors", 5000);
  expect({"generate", "-m", model, "-p", "x"}, 1, "[safetensors]");
}

TEST_F(Generate, InfoCountsParametersAndState) {
  const Result result = call({"info", folder_.path(), "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  const json info = json::parse(result.out);
  EXPECT_EQ(info["parameters"], parameters_);
  int64_t sum = 0;
  for (const auto& [part, count] : info["parameters_by_part"].items()) sum += count.get<int64_t>();
  EXPECT_EQ(sum, parameters_);
  EXPECT_EQ(info["parameters_by_part"]["embeddings"], 256 * 32);
  EXPECT_EQ(info["parameters_by_part"]["norms"], 5 * 32);
  EXPECT_EQ(info["parameters_by_part"]["feed_forward"], 2 * 3 * 48 * 32);
  EXPECT_TRUE(info["parameters_by_part"].contains("attention"));
  EXPECT_EQ(info["config"]["model_type"], "gated_deltanet");
  const int64_t state = CausalLM(load_model_config(folder_.path())).zero_state(1).bytes();
  EXPECT_EQ(info["state_bytes_per_sequence"], state);
  EXPECT_THAT(call({"info", folder_.path()}).out, HasSubstr("state bytes per sequence"));
  EXPECT_EQ(call({"info", "/no/such/model"}).status, 1);
}

// A run that is cut in two, with the state in a file between, gives what the whole run gives.
TEST(GenerateState, IsCarriedBetweenRunsByEveryKindOfMixer) {
  const char* recurrent[] = {"gated_delta_net", "attention",  "ttt_linear", "ttt_mlp",
                             "titans_lmm",      "titans_mac", "titans_mag", "titans_mal"};
  for (const char* mixer : recurrent) {
    testing::seed(6);
    testing::TempFolder folder;
    BlockConfig block;
    block.mixer = mixer;
    ModelConfig config = testing::tiny_config({block});
    config.hidden_size = 16;
    config.vocab_size = 256;
    const CausalLM model(config);
    save_model(folder.path(), model, nullptr);
    const std::string file = folder / "a.state";
    const auto run = [&](const char* count, std::initializer_list<std::string> more) {
      std::vector<std::string> words = {"generate", "-m",  folder.path(), "--greedy",
                                        "-n",       count, "-q",          "--ignore-eos"};
      words.insert(words.end(), more);
      return cli_testing::call(words);
    };
    const Result whole = run("9", {"--prompt-ids", "72,105,7,9,200"});
    ASSERT_EQ(whole.status, 0) << whole.err;
    const Result first = run("4", {"--prompt-ids", "72,105,7,9,200", "--state-out", file});
    ASSERT_EQ(first.status, 0) << first.err;
    const Result second = run("5", {"--state-in", file});
    ASSERT_EQ(second.status, 0) << second.err;
    const std::string head = first.out.substr(0, first.out.size() - 1);
    EXPECT_EQ(head + "," + second.out, whole.out) << mixer;
    // A prompt in two parts.
    ASSERT_EQ(run("0", {"--prompt-ids", "72,105,7", "--state-out", file}).status, 0);
    EXPECT_EQ(run("9", {"--state-in", file, "--prompt-ids", "9,200"}).out, whole.out) << mixer;
  }
}

TEST(GenerateState, OfAnotherModelIsRefused) {
  testing::TempFolder a, b, c;
  testing::seed(1);
  ModelConfig config = testing::tiny_config();
  config.vocab_size = 256;
  save_model(a.path(), CausalLM(config), nullptr);
  save_model(b.path(), CausalLM(config), nullptr);  // other weights
  config.norm_eps = 1e-5;
  save_model(c.path(), CausalLM(config), nullptr);
  const std::string file = a / "a.state";
  ASSERT_EQ(call({"generate", "-m", a.path(), "--prompt-ids", "1", "-n", "1", "--state-out", file})
                .status,
            0);
  const auto error = [&](const testing::TempFolder& model, const std::string& path) {
    const Result result = call({"generate", "-m", model.path(), "-n", "1", "--state-in", path});
    EXPECT_EQ(result.status, 1);
    return result.err;
  };
  EXPECT_THAT(error(b, file), HasSubstr("was left by a model with other weights"));
  EXPECT_THAT(error(c, file), HasSubstr("was left by a model of another configuration"));
  EXPECT_THAT(error(a, a / "model.safetensors"), HasSubstr("is not a saved state"));
  const Result twice = call(
      {"generate", "-m", a.path(), "--prompt-ids", "1", "--num-samples", "2", "--state-out", file});
  EXPECT_EQ(twice.status, 2);
  EXPECT_THAT(twice.err, HasSubstr("--state-out is for one sample"));
}

}  // namespace
}  // namespace gdn
