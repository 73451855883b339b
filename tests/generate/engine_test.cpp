// SPDX-License-Identifier: Apache-2.0
#include "gdn/generate/engine.h"

#include <ATen/ops/argmax.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/generate/stop.h"
#include "tests/model/support.h"

namespace gdn {
namespace {

using namespace gdn::testing;  // NOLINT

TEST(StopMatcher, FindsStopsAcrossPieces) {
  const auto run = [](std::vector<std::string> stops, std::vector<std::string> pieces) {
    StopMatcher matcher(std::move(stops));
    std::string shown;
    for (const std::string& piece : pieces) shown += matcher.push(piece);
    return shown + matcher.flush() + (matcher.stopped() ? "|stopped" : "");
  };
  EXPECT_EQ(run({"END"}, {"abcEN", "D", "more"}), "abc|stopped");
  EXPECT_EQ(run({"END"}, {"a", "E", "N", "x"}), "aENx");
  EXPECT_EQ(run({"END"}, {"aE", "EN", "D"}), "aE|stopped");
  EXPECT_EQ(run({"END"}, {"aEN"}), "aEN");  // never completed
  EXPECT_EQ(run({"abab", "bc"}, {"ab", "a", "bc"}), "|stopped");
  EXPECT_EQ(run({"bc", "abab"}, {"xaba", "cbc"}), "xabac|stopped");
  EXPECT_EQ(run({"late", "a"}, {"xxlate"}), "xx|stopped");  // the earliest place wins
  EXPECT_EQ(run({"", "\n\n"}, {"a\n", "b\n", "\nc"}), "a\nb|stopped");
  EXPECT_EQ(run({}, {"a", "b"}), "ab");
}

TEST(StopMatcher, HoldsBackNoMoreThanItMust) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.push("abcE"), "abc");
  EXPECT_EQ(matcher.push("x"), "Ex");
}

// Byte models whose next byte is a function of the last one: zero weights but for a table in
// embedding and head.
class Engine : public ::testing::Test {
 protected:
  void SetUp() override {
    seed(4);
    tokenizer_ = make_byte_tokenizer();
  }
  static ModelConfig byte_config() {
    ModelConfig config = tiny_config({gdn_block(), gdn_block()});
    config.vocab_size = 256;
    return config;
  }
  // Every byte of `cycle` (all different) is followed by the next one, the last by the first.
  std::unique_ptr<CausalLM> cyclic_model(const std::string& cycle) {
    ModelConfig config = byte_config();
    config.hidden_size = 64;
    auto model = std::make_unique<CausalLM>(config);
    const c10::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      if (item.key().find("layers") != std::string::npos) item.value().zero_();
    }
    auto parameters = model->named_parameters();
    auto embedding = parameters["model.embeddings.weight"].zero_(),
         head = parameters["lm_head.weight"].zero_();
    for (size_t i = 0; i < cycle.size(); ++i) {
      const auto byte = static_cast<uint8_t>(cycle[i]),
                 next = static_cast<uint8_t>(cycle[(i + 1) % cycle.size()]);
      embedding[byte][static_cast<int64_t>(i)] = 1.0;
      head[next][static_cast<int64_t>(i)] = 10.0;
    }
    return model;
  }
  static GenerateOptions greedy(int64_t tokens) {
    GenerateOptions options;
    options.max_new_tokens = tokens;
    options.sampling.temperature = 0;
    return options;
  }
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(Engine, GreedyIsTheArgmaxOfWholeSequences) {
  for (const bool hybrid : {false, true}) {
    ModelConfig config = byte_config();
    if (hybrid) config.blocks = {gdn_block(), attention_block(), gdn_block()};
    CausalLM model(config);
    const Generator generator(model, tokenizer_.get());
    const Prefill prompt = generator.prefill(generator.encode("The prompt"));
    const Generation out = generator.generate(prompt, greedy(12));
    ASSERT_EQ(out.ids.size(), 12u);
    EXPECT_EQ(out.finish_reason, "length");
    EXPECT_GT(out.state_bytes, 0);
    const c10::NoGradGuard no_grad;
    std::vector<int64_t> ids = prompt.ids;
    for (const int64_t id : out.ids) {
      const auto all = model.logits(model.hidden(at::tensor(ids, at::kLong).unsqueeze(0)));
      EXPECT_EQ(at::argmax(all[0][static_cast<int64_t>(ids.size()) - 1]).item<int64_t>(), id);
      ids.push_back(id);
    }
  }
}

TEST_F(Engine, ALongPromptGoesThroughInPieces) {
  CausalLM model(byte_config());
  const Generator generator(model, tokenizer_.get());
  const auto ids = random_ids(1, 2100, 256);
  const std::vector<int64_t> prompt(ids.const_data_ptr<int64_t>(),
                                    ids.const_data_ptr<int64_t>() + 2100);
  const auto logits = generator.prefill(prompt).logits;
  const c10::NoGradGuard no_grad;
  const auto whole = model.logits(model.hidden(ids)[0][2099]);
  EXPECT_LT((logits - whole).abs().max().item<double>(), 1e-3 * whole.abs().max().item<double>());
}

TEST_F(Engine, SeedsRepeatAndSamplesDiffer) {
  CausalLM model(byte_config());
  const Generator generator(model, tokenizer_.get());
  const Prefill prompt = generator.prefill(generator.encode("x"));
  GenerateOptions options;
  options.max_new_tokens = 20;
  options.sampling.seed = 7;
  const auto first = generator.generate(prompt, options, 0).ids;
  EXPECT_EQ(generator.generate(prompt, options, 0).ids, first);
  EXPECT_EQ(generator.generate(generator.prefill(prompt.ids), options, 0).ids, first);
  EXPECT_NE(generator.generate(prompt, options, 1).ids, first);
  options.sampling.seed = 8;
  EXPECT_NE(generator.generate(prompt, options, 0).ids, first);
}

TEST_F(Engine, StopStringsEndTheTextBeforeThem) {
  const auto model = cyclic_model("abcdef");
  const Generator generator(*model, tokenizer_.get());
  const Prefill prompt = generator.prefill(generator.encode("a"));
  GenerateOptions options = greedy(20);
  EXPECT_EQ(generator.generate(prompt, options).text, "bcdefabcdefabcdefabc");
  options.stop = {"efa", "zz"};
  std::string streamed;
  const Generation out = generator.generate(prompt, options, 0, [&](std::string_view text) {
    streamed += text;
    return true;
  });
  EXPECT_EQ(out.text, "bcd");
  EXPECT_EQ(streamed, "bcd");
  EXPECT_EQ(out.finish_reason, "stop");
  EXPECT_EQ(out.ids.size(), 6u);
  options.stop = {"fg"};  // begins but never completes: held back, then shown
  options.max_new_tokens = 5;
  EXPECT_EQ(generator.generate(prompt, options).text, "bcdef");
}

TEST_F(Engine, CharactersAreStreamedWhole) {
  const auto model = cyclic_model("a\xe2\x82\xac");  // a and the euro sign
  const Generator generator(*model, tokenizer_.get());
  std::vector<std::string> pieces;
  const auto sink = [&](std::string_view text) {
    if (!text.empty()) pieces.emplace_back(text);
    return true;
  };
  const Prefill prompt = generator.prefill(generator.encode("a"));
  const Generation out = generator.generate(prompt, greedy(6), 0, sink);
  EXPECT_THAT(pieces, ::testing::ElementsAre("\xe2\x82\xac", "a",
                                             "\xef\xbf\xbd"));  // the last one was cut short
  EXPECT_EQ(out.text,
            "\xe2\x82\xac"
            "a\xef\xbf\xbd");
}

TEST_F(Engine, EndOfSequenceEndsUnlessIgnored) {
  auto model = cyclic_model("abc");
  ModelConfig config = model->config();
  config.eos_token_id = 'c';
  CausalLM with_eos(config);
  {
    const c10::NoGradGuard no_grad;
    const auto from = model->named_parameters();
    for (auto& item : with_eos.named_parameters()) item.value().copy_(from[item.key()]);
  }
  const Generator generator(with_eos, tokenizer_.get());
  const Prefill prompt = generator.prefill(generator.encode("a"));
  GenerateOptions options = greedy(5);
  const Generation out = generator.generate(prompt, options);
  EXPECT_EQ(out.ids, (std::vector<int64_t>{'b', 'c'}));
  EXPECT_EQ(out.text, "b");
  EXPECT_EQ(out.finish_reason, "stop");
  options.ignore_eos = true;
  EXPECT_EQ(generator.generate(prompt, options).text, "bcabc");
  EXPECT_EQ(generator.encode(""), std::vector<int64_t>{'c'});
}

TEST_F(Engine, TheSinkCanInterrupt) {
  const auto model = cyclic_model("abc");
  const Generator generator(*model, tokenizer_.get());
  int calls = 0;
  const Generation out = generator.generate(generator.prefill({'a'}), greedy(50), 0,
                                            [&](std::string_view) { return ++calls < 3; });
  EXPECT_EQ(out.finish_reason, "interrupted");
  EXPECT_EQ(out.ids.size(), 3u);
}

TEST_F(Engine, PaddedVocabularyIsNeverDrawn) {
  ModelConfig config = byte_config();
  config.vocab_size = 300;
  CausalLM model(config);
  {
    const c10::NoGradGuard no_grad;
    model.named_parameters()["lm_head.weight"].narrow(0, 256, 44).mul_(1000);
  }
  const Generator generator(model, tokenizer_.get());
  for (const int64_t id : generator.generate(generator.prefill({65}), greedy(20)).ids)
    EXPECT_LT(id, 256);
}

TEST_F(Engine, BadInputIsNamed) {
  CausalLM model(byte_config());
  const Generator generator(model, tokenizer_.get());
  EXPECT_THAT(
      [&] {
        generator.prefill({3, 256});
      },
      ::testing::ThrowsMessage<Error>(
          ::testing::HasSubstr("prompt token 256 is outside the vocabulary")));
  EXPECT_THROW(generator.prefill({-1}), Error);
  EXPECT_THROW(generator.prefill({}), Error);
  EXPECT_THROW(generator.encode(""), UsageError);
  EXPECT_THROW(Generator(model, nullptr).encode("x"), Error);
  CausalLM small(tiny_config());
  EXPECT_THROW(Generator(small, tokenizer_.get()), Error);
  GenerateOptions options = greedy(-1);
  EXPECT_THROW(generator.generate(generator.prefill({3}), options), UsageError);
  EXPECT_TRUE(generator.generate(generator.prefill({3}), greedy(0)).ids.empty());
}

}  // namespace
}  // namespace gdn
