// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/checkpoint.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/mixers/mixer.h"
#include "tests/model/support.h"

namespace gdn {
namespace {

using namespace gdn::testing;  // NOLINT
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::ThrowsMessage;
namespace fs = std::filesystem;

at::Tensor logits(CausalLM& model, const at::Tensor& ids) {
  const c10::NoGradGuard no_grad;
  return model.logits(model.hidden(ids));
}

NamedTensors tensors_of(const CausalLM& model) {
  NamedTensors tensors;
  for (const auto& item : model.named_parameters()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

TEST(Tensors, RoundTripOfEveryDType) {
  const TempFolder folder;
  NamedTensors tensors;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                           at::kShort, at::kChar, at::kByte, at::kBool}) {
    tensors.emplace_back(c10::toString(dtype), at::arange(6).view({2, 3}).to(dtype).t());
  }
  tensors.emplace_back("scalar", at::ones({}));
  tensors.emplace_back("empty", at::ones({0, 4}));
  save_tensors(folder / "x.safetensors", tensors, {{"step", "12"}});
  const LoadedTensors loaded = load_tensors(folder / "x.safetensors");
  EXPECT_EQ(loaded.metadata.at("step"), "12");
  EXPECT_EQ(loaded.tensors.size(), tensors.size());
  const std::map<std::string, at::Tensor> found(loaded.tensors.begin(), loaded.tensors.end());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(found.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(found.at(name), tensor)) << name;
  }
}

TEST(Checkpoint, RoundTripIsExact) {
  for (const bool tied : {false, true}) {
    const TempFolder folder;
    ModelConfig config = tiny_config({gdn_block(), attention_block()});
    config.tie_word_embeddings = tied;
    config.eos_token_id = 5;
    CausalLM model(config);
    const auto tokenizer = make_byte_tokenizer();
    save_model(folder / "a/b", model, tokenizer.get());
    LoadedModel loaded = load_model(folder / "a/b");
    EXPECT_EQ(loaded.model->config(), model.config());
    const auto ids = random_ids(2, 9);
    EXPECT_TRUE(at::equal(logits(model, ids), logits(*loaded.model, ids)));
    ASSERT_NE(loaded.tokenizer, nullptr);
    EXPECT_EQ(loaded.tokenizer->type(), "byte");
    const auto generation =
        nlohmann::json::parse(read_text_file(folder / "a/b/generation_config.json"));
    EXPECT_EQ(generation["eos_token_id"], 5);
  }
}

TEST(Checkpoint, EveryMixerAndFeedForwardIsReadBackExactly) {
  std::vector<BlockConfig> kinds;
  for (const MixerInfo& info : mixers()) kinds.emplace_back().mixer = info.name;
  for (const char* name : {"moe", "rwkv_channel_mix"}) {
    kinds.emplace_back().mixer = "";
    kinds.back().feed_forward = name;
  }
  for (const BlockConfig& kind : kinds) {
    SCOPED_TRACE(kind.mixer + " " + kind.feed_forward);
    const TempFolder folder;
    CausalLM model(tiny_config({kind, kind}));
    save_model(folder.path(), model, nullptr);
    LoadedModel loaded = load_model(folder.path());
    EXPECT_EQ(loaded.model->config(), model.config());
    const auto ids = random_ids(2, 9);
    EXPECT_TRUE(at::equal(logits(model, ids), logits(*loaded.model, ids)));
  }
}

TEST(Checkpoint, TokenizerIsOptionalAndHalfPrecisionIsRead) {
  const TempFolder folder;
  CausalLM model(tiny_config());
  save_model(folder.path(), model, nullptr);
  NamedTensors tensors = tensors_of(model);
  for (auto& [name, tensor] : tensors) tensor = tensor.to(at::kBFloat16);
  save_tensors(folder / "model.safetensors", tensors);
  LoadedModel loaded = load_model(folder.path());
  EXPECT_EQ(loaded.tokenizer, nullptr);
  const auto read = loaded.model->named_parameters()["lm_head.weight"];
  EXPECT_EQ(read.scalar_type(), at::kFloat);
  EXPECT_TRUE(
      at::equal(read, model.named_parameters()["lm_head.weight"].to(at::kBFloat16).to(at::kFloat)));
}

TEST(Checkpoint, ATiedFileMayRepeatTheHead) {
  const TempFolder folder;
  ModelConfig config = tiny_config();
  config.tie_word_embeddings = true;
  CausalLM model(config);
  NamedTensors tensors = tensors_of(model);
  tensors.emplace_back("lm_head.weight", model.named_parameters()["model.embeddings.weight"]);
  save_tensors(folder / "x.safetensors", tensors);
  EXPECT_NO_THROW(load_weights(model, folder / "x.safetensors"));
}

TEST(Checkpoint, WeightsThatDoNotFitAreNamedAndNothingIsCopied) {
  const TempFolder folder;
  CausalLM model(tiny_config());
  const NamedTensors good = tensors_of(model);
  const auto expect_misfit = [&](NamedTensors tensors,
                                 const ::testing::Matcher<std::string>& what) {
    for (auto& [name, tensor] : tensors) tensor = at::ones_like(tensor);
    save_tensors(folder / "x.safetensors", tensors);
    EXPECT_THAT([&] { load_weights(model, folder / "x.safetensors"); },
                ThrowsMessage<Error>(AllOf(HasSubstr("does not fit the model"),
                                           HasSubstr("config.json"), Not(HasSubstr("\n")), what)));
    EXPECT_FALSE(at::equal(model.named_parameters()["model.embeddings.weight"],
                           at::ones_like(model.named_parameters()["model.embeddings.weight"])));
  };
  NamedTensors fewer(good.begin() + 1, good.end());
  expect_misfit(fewer, HasSubstr("it lacks 1 tensor (" + good[0].first + ")"));
  NamedTensors more = good;
  more.emplace_back("model.extra", at::ones({2}));
  expect_misfit(more, HasSubstr("it has 1 tensor (model.extra) that the model does not know"));
  NamedTensors reshaped = good;
  reshaped[0].second = at::ones({3, 5});
  expect_misfit(reshaped,
                AllOf(HasSubstr(good[0].first + " is [3, 5], the model needs ["), HasSubstr("]")));
  NamedTensors integers = good;
  integers[0].second = integers[0].second.to(at::kLong);
  expect_misfit(integers, HasSubstr("has dtype I64"));
}

TEST(Checkpoint, BrokenFoldersAreNamed) {
  const TempFolder folder;
  const auto expect_error = [&](const std::string& what) {
    EXPECT_THAT([&] { load_model(folder / "m"); }, ThrowsMessage<Error>(HasSubstr(what)));
  };
  expect_error("there is no model folder");
  fs::create_directory(folder / "m");
  expect_error("holds no config.json");
  atomic_write_file(folder / "m/config.json", "{");
  expect_error("not valid JSON");
  atomic_write_file(folder / "m/config.json",
                    R"({"model_type": "gdn", "blocks": [{"mixer": "gated_deltanet"}]})");
  expect_error("config.json: unknown mixer");
  atomic_write_file(folder / "m/config.json", R"({"model_type": "gdn", "blocks": []})");
  expect_error("at least one block");
  atomic_write_file(folder / "m/config.json", to_json(tiny_config()).dump());
  expect_error("holds neither model.safetensors");
  atomic_write_file(folder / "m/model.safetensors", "nonsense");
  expect_error("[safetensors]");
}

}  // namespace
}  // namespace gdn
