// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/recall.h"

#include <ATen/Context.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using ::testing::HasSubstr;

ModelConfig small_config(int64_t vocab) {
  ModelConfig config;
  config.vocab_size = vocab;
  config.hidden_size = 32;
  config.intermediate_size = 32;
  config.initializer_range = 0.3;
  BlockConfig block;
  block.mixer_options = {{"num_heads", 2}, {"head_dim", 16}, {"expand_v", 1.0}};
  config.blocks = {block, block};
  return config;
}

TEST(Recall, AnswersAreTheLikeliestTokensBehindTheQuestionMarks) {
  at::manual_seed(3);
  CausalLM model(small_config(make_story_tokenizer()->vocab_size()));
  // Stories of different lengths, so that rows are padded.
  std::vector<Story> stories = held_out_stories(150, 0, 5);
  for (const Story& story : held_out_stories(70, 0, 3)) stories.push_back(story);
  const auto answers = answer_stories(model, stories, 3);
  ASSERT_EQ(answers.size(), stories.size());
  const c10::NoGradGuard no_grad;
  for (size_t i = 0; i < stories.size(); ++i) {
    ASSERT_EQ(answers[i].size(), stories[i].answers.size());
    for (size_t q = 0; q < answers[i].size(); ++q) {
      // Only what stands before the answer.
      const std::vector<int64_t> before(stories[i].ids.begin(),
                                        stories[i].ids.begin() + stories[i].answers[q].position);
      const at::Tensor logits =
          model.logits(model.hidden(at::tensor(before, at::kLong).unsqueeze(0)))[0][-1];
      EXPECT_EQ(answers[i][q], logits.argmax().item<int64_t>())
          << "story " << i << ", question " << q;
    }
  }
}

TEST(Recall, ScoresCountRightAnswersPerQuestion) {
  const std::vector<Story> stories = held_out_stories(192, 7, 40);
  EXPECT_EQ(stories[0].ids, make_held_out_story(192, 7).ids);
  std::vector<std::vector<int32_t>> truth, wrong, people_wrong;
  std::array<int64_t, kNumQuestions + 1> asked{};
  for (const Story& story : stories) {
    truth.emplace_back(), wrong.emplace_back(), people_wrong.emplace_back();
    for (const StoryAnswer& answer : story.answers) {
      const int32_t id = story.ids[answer.position];
      truth.back().push_back(id);
      wrong.back().push_back(id + 1);
      people_wrong.back().push_back(answer.question == Question::kWhoHasThing ? id + 1 : id);
      ++asked[static_cast<size_t>(answer.question)];
      ++asked[kNumQuestions];
    }
  }
  const auto right = score_recall(stories, truth), none = score_recall(stories, wrong),
             some = score_recall(stories, people_wrong);
  const GuessedRecall guessed = guess_recall(stories);
  ASSERT_EQ(right.size(), kNumQuestions + 1u);
  for (size_t k = 0; k <= kNumQuestions; ++k) {
    EXPECT_EQ(right[k].asked, asked[k]);
    EXPECT_EQ(right[k].recall, 1.0);
    EXPECT_EQ(none[k].recall, 0.0);
    EXPECT_EQ(right[k].chance, guessed.chance[k]);
    EXPECT_EQ(right[k].any_value_of_key, guessed.any_value_of_key[k]);
  }
  const size_t who = static_cast<size_t>(Question::kWhoHasThing);
  EXPECT_EQ(some[who].recall, 0.0);
  EXPECT_EQ(some[who].question, "Who has <thing>?");
  EXPECT_DOUBLE_EQ(some[kNumQuestions].recall,
                   1 - static_cast<double>(asked[who]) / static_cast<double>(asked[kNumQuestions]));
  const std::string table = recall_table({"model A", "model B"}, {right, some});
  EXPECT_THAT(table, HasSubstr("model B"));
  EXPECT_THAT(table, HasSubstr("100.0%           0.0%"));
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), kNumQuestions + 2);
}

TEST(Recall, RefusesWhatDoesNotFit) {
  CausalLM model(small_config(8));
  EXPECT_THROW(answer_stories(model, held_out_stories(64, 0, 1)), Error);
  EXPECT_THROW(score_recall(held_out_stories(64, 0, 2), {{}}), Error);
  EXPECT_THROW(score_recall(held_out_stories(64, 0, 1), {{1, 2, 3, 4, 5, 6, 7, 8, 9}}), Error);
  EXPECT_THROW(recall_table({"one"}, {}), Error);
}

}  // namespace
}  // namespace gdn
