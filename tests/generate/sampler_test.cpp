// SPDX-License-Identifier: Apache-2.0
#include "gdn/generate/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "gdn/base/check.h"

namespace gdn {
namespace {

// Probabilities 0.4, 0.3, 0.2, 0.1 of tokens 2, 0, 3, 1.
const std::vector<float> kLogits = {std::log(0.3f), std::log(0.1f), std::log(0.4f), std::log(0.2f)};

SamplingOptions plain() {
  SamplingOptions options;
  options.temperature = 1.0;
  return options;
}

// Relative frequencies over independent samplers, so that penalties see no earlier draw.
std::map<int64_t, double> frequencies(SamplingOptions options,
                                      const std::vector<float>& logits = kLogits) {
  constexpr int kDraws = 20000;
  std::map<int64_t, double> result;
  for (int i = 0; i < kDraws; ++i) {
    Sampler sampler(options, static_cast<uint64_t>(i));
    result[sampler.next(logits)] += 1.0 / kDraws;
  }
  return result;
}

void expect_distribution(const std::map<int64_t, double>& found,
                         const std::map<int64_t, double>& expected) {
  for (const auto& [id, p] : found)
    EXPECT_TRUE(expected.contains(id)) << "token " << id << " was drawn";
  for (const auto& [id, p] : expected) {
    const double deviation = std::sqrt(p * (1 - p) / 20000);
    const auto entry = found.find(id);
    EXPECT_NEAR(entry == found.end() ? 0 : entry->second, p, 5 * deviation + 1e-9)
        << "token " << id;
  }
}

TEST(Sampler, DrawsTheSoftmax) {
  expect_distribution(frequencies(plain()), {{0, 0.3}, {1, 0.1}, {2, 0.4}, {3, 0.2}});
}

TEST(Sampler, TemperatureSharpens) {
  SamplingOptions options = plain();
  options.temperature = 0.5;  // squares the probabilities; their sum is 0.3
  expect_distribution(frequencies(options),
                      {{0, 0.3}, {1, 1.0 / 30}, {2, 16.0 / 30}, {3, 4.0 / 30}});
}

TEST(Sampler, TemperatureZeroIsTheMostLikelyLowestId) {
  SamplingOptions options = plain();
  options.temperature = 0;
  EXPECT_EQ(Sampler(options, 0).next(kLogits), 2);
  EXPECT_EQ(Sampler(options, 0).next(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(Sampler, TopK) {
  SamplingOptions options = plain();
  options.top_k = 2;
  expect_distribution(frequencies(options), {{2, 4.0 / 7}, {0, 3.0 / 7}});
  options.top_k = 1;  // of equals, the lower id
  expect_distribution(frequencies(options, {1, 3, 3, 2}), {{1, 1.0}});
  options.top_k = 99;
  expect_distribution(frequencies(options), {{0, 0.3}, {1, 0.1}, {2, 0.4}, {3, 0.2}});
}

TEST(Sampler, TopPKeepsTheTokenThatReachesIt) {
  SamplingOptions options = plain();
  options.top_p = 0.65;
  expect_distribution(frequencies(options), {{2, 4.0 / 7}, {0, 3.0 / 7}});
  options.top_p = 0.75;
  expect_distribution(frequencies(options), {{2, 4.0 / 9}, {0, 3.0 / 9}, {3, 2.0 / 9}});
  options.top_p = 0.01;
  expect_distribution(frequencies(options), {{2, 1.0}});
}

TEST(Sampler, MinPIsRelativeToTheMostLikely) {
  SamplingOptions options = plain();
  options.min_p = 0.45;  // at least 0.18
  expect_distribution(frequencies(options), {{2, 4.0 / 9}, {0, 3.0 / 9}, {3, 2.0 / 9}});
  options.min_p = 0.55;
  expect_distribution(frequencies(options), {{2, 4.0 / 7}, {0, 3.0 / 7}});
}

// Each pair of steps is chosen such that the other order would keep other tokens.
TEST(Sampler, OrderOfTheSteps) {
  SamplingOptions options = plain();
  options.top_k =
      3;  // leaves 4/9, 3/9, 2/9; top-p before top-k would see 0.4 + 0.3 < 0.72 and keep three
  options.top_p = 0.72;
  expect_distribution(frequencies(options), {{2, 4.0 / 7}, {0, 3.0 / 7}});

  options = plain();
  options.top_p = 0.65;  // keeps two at temperature 1; after temperature 3 it would keep three
  options.temperature = 3;
  const double a = std::cbrt(0.4), b = std::cbrt(0.3);
  expect_distribution(frequencies(options), {{2, a / (a + b)}, {0, b / (a + b)}});

  options = plain();
  options.min_p = 0.45;  // three at temperature 1; all four at temperature 3
  options.temperature = 3;
  const double c = std::cbrt(0.2);
  expect_distribution(frequencies(options),
                      {{2, a / (a + b + c)}, {0, b / (a + b + c)}, {3, c / (a + b + c)}});
}

TEST(Sampler, RepetitionPenaltyCountsPromptAndOutput) {
  SamplingOptions options = plain();
  options.temperature = 0;
  options.repetition_penalty = 2;
  Sampler sampler(options, 0);
  sampler.add_prompt_token(3);
  sampler.add_prompt_token(1000);                                       // outside these logits
  EXPECT_EQ(sampler.next(std::vector<float>{1, -1, 3.5f, 6.5f}), 2);    // 6.5 -> 3.25
  EXPECT_EQ(sampler.next(std::vector<float>{2.5f, 2, 4.5f, 4.5f}), 0);  // 2 and 3 at 2.25
  EXPECT_EQ(sampler.next(std::vector<float>{-2, -3, -2, -2}), 1);  // negative ones are multiplied
}

TEST(Sampler, PresenceAndFrequencyPenaltiesCountTheOutputOnly) {
  SamplingOptions options = plain();
  options.temperature = 0;
  options.presence_penalty = 1;
  Sampler presence(options, 0);
  presence.add_prompt_token(0);
  const std::vector<float> logits = {3, 2.5f, 0, 0};
  EXPECT_EQ(presence.next(logits), 0);
  EXPECT_EQ(presence.next(logits), 1);
  EXPECT_EQ(presence.next(logits), 0);  // 2 against 1.5: once only
  EXPECT_EQ(presence.next(logits), 0);
  options.presence_penalty = 0;
  options.frequency_penalty = 0.4;
  Sampler frequency(options, 0);
  std::vector<int64_t> drawn;
  for (int i = 0; i < 5; ++i) drawn.push_back(frequency.next(logits));
  EXPECT_EQ(drawn,
            (std::vector<int64_t>{0, 0, 1, 0, 1}));  // 3, 2.6, 2.5 / 2.2, 2.2 / 2.1, 2.1 at 1.8
}

TEST(Sampler, SeedAndStreamDetermineTheDraws) {
  const auto draws = [](uint64_t seed, uint64_t stream) {
    SamplingOptions options = plain();
    options.seed = seed;
    Sampler sampler(options, stream);
    std::vector<int64_t> ids;
    for (int i = 0; i < 40; ++i) ids.push_back(sampler.next(kLogits));
    return ids;
  };
  EXPECT_EQ(draws(1, 0), draws(1, 0));
  EXPECT_NE(draws(1, 0), draws(2, 0));
  EXPECT_NE(draws(1, 0), draws(1, 1));
}

TEST(Sampler, MaskedTokensAreNeverDrawn) {
  const float none = -std::numeric_limits<float>::infinity();
  expect_distribution(frequencies(plain(), {none, 0, none, 0}), {{1, 0.5}, {3, 0.5}});
}

TEST(Sampler, BrokenLogitsAndOptionsAreErrors) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_THAT(
      [] {
        Sampler(plain(), 0).next(std::vector<float>{0, NAN});
      },
      ::testing::ThrowsMessage<Error>(::testing::HasSubstr("the logit of token 1 is nan")));
  EXPECT_THROW(Sampler(plain(), 0).next(std::vector<float>{0, inf}), Error);
  EXPECT_THROW(Sampler(plain(), 0).next(std::vector<float>{-inf, -inf}), Error);
  const auto rejected = [](auto change) {
    SamplingOptions options;
    change(options);
    EXPECT_THROW(options.validate(), UsageError);
  };
  rejected([](SamplingOptions& o) { o.temperature = -1; });
  rejected([](SamplingOptions& o) { o.temperature = NAN; });
  rejected([](SamplingOptions& o) { o.top_k = -1; });
  rejected([](SamplingOptions& o) { o.top_p = 0; });
  rejected([](SamplingOptions& o) { o.top_p = 1.1; });
  rejected([](SamplingOptions& o) { o.min_p = 2; });
  rejected([](SamplingOptions& o) { o.repetition_penalty = 0; });
  rejected([](SamplingOptions& o) { o.presence_penalty = INFINITY; });
}

}  // namespace
}  // namespace gdn
