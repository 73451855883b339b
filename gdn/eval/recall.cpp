// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/recall.h"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "gdn/base/check.h"

namespace gdn {
namespace {

// Stories of one batch as rows padded on the right, which changes nothing before the padding.
std::vector<std::vector<int32_t>> answer_batch(CausalLM& model, const Story* stories,
                                               int64_t count) {
  int64_t T = 0;
  for (int64_t i = 0; i < count; ++i) T = std::max(T, static_cast<int64_t>(stories[i].ids.size()));
  at::Tensor ids = at::full({count, T}, stories[0].ids.back(), at::kLong);
  std::vector<int64_t> marks;  // flat positions of the question marks
  for (int64_t i = 0; i < count; ++i) {
    int64_t* row = ids.mutable_data_ptr<int64_t>() + i * T;
    std::copy(stories[i].ids.begin(), stories[i].ids.end(), row);
    for (const StoryAnswer& answer : stories[i].answers)
      marks.push_back(i * T + answer.position - 1);
  }
  const at::Tensor hidden = model.hidden(ids);  // [B,T,D]
  const at::Tensor asked =
      hidden.reshape({count * T, -1}).index_select(0, at::tensor(marks, at::kLong));
  const at::Tensor best = model.logits(asked).argmax(-1);  // [marks]
  const int64_t* next = best.const_data_ptr<int64_t>();
  std::vector<std::vector<int32_t>> answers(count);
  for (int64_t i = 0; i < count; ++i) {
    for (size_t q = 0; q < stories[i].answers.size(); ++q)
      answers[i].push_back(static_cast<int32_t>(*next++));
  }
  return answers;
}

}  // namespace

std::vector<std::vector<int32_t>> answer_stories(CausalLM& model, const std::vector<Story>& stories,
                                                 int64_t batch_size) {
  const int64_t vocab = make_story_tokenizer()->vocab_size();
  GDN_CHECK(model.config().vocab_size >= vocab, "[recall] the model has ",
            model.config().vocab_size, " words, the stories ", vocab,
            "; give a model trained on the stories");
  const c10::NoGradGuard no_grad;
  std::vector<std::vector<int32_t>> answers;
  const int64_t count = static_cast<int64_t>(stories.size());
  for (int64_t begin = 0; begin < count; begin += batch_size) {
    auto batch = answer_batch(model, stories.data() + begin, std::min(batch_size, count - begin));
    answers.insert(answers.end(), batch.begin(), batch.end());
  }
  return answers;
}

std::vector<RecallScore> score_recall(const std::vector<Story>& stories,
                                      const std::vector<std::vector<int32_t>>& answers) {
  GDN_CHECK(stories.size() == answers.size(), "[recall] ", stories.size(), " stories, ",
            answers.size(), " answers");
  const GuessedRecall guessed = guess_recall(stories);
  std::vector<RecallScore> scores(kNumQuestions + 1);
  std::array<int64_t, kNumQuestions + 1> right{};
  for (size_t i = 0; i < stories.size(); ++i) {
    GDN_CHECK(stories[i].answers.size() == answers[i].size(), "[recall] story ", i, " has ",
              stories[i].answers.size(), " questions, ", answers[i].size(), " answers");
    for (size_t q = 0; q < answers[i].size(); ++q) {
      const StoryAnswer& asked = stories[i].answers[q];
      const bool ok = answers[i][q] == stories[i].ids[asked.position];
      for (const size_t k :
           {static_cast<size_t>(asked.question), static_cast<size_t>(kNumQuestions)}) {
        ++scores[k].asked;
        right[k] += ok;
      }
    }
  }
  for (size_t k = 0; k <= kNumQuestions; ++k) {
    scores[k].question = k == kNumQuestions ? "all" : question_text(static_cast<Question>(k));
    scores[k].recall = scores[k].asked == 0
                           ? 0
                           : static_cast<double>(right[k]) / static_cast<double>(scores[k].asked);
    scores[k].chance = guessed.chance[k];
    scores[k].any_value_of_key = guessed.any_value_of_key[k];
  }
  return scores;
}

std::vector<Story> held_out_stories(int64_t max_tokens, int64_t first, int64_t count) {
  std::vector<Story> stories;
  for (int64_t i = first; i < first + count; ++i)
    stories.push_back(make_held_out_story(max_tokens, i));
  return stories;
}

std::string recall_table(const std::vector<std::string>& models,
                         const std::vector<std::vector<RecallScore>>& scores) {
  GDN_CHECK(!models.empty() && models.size() == scores.size(), "[recall] ", models.size(),
            " names for ", scores.size(), " models");
  std::string text;
  char cell[160];
  const auto put = [&](const char* format, auto... values) {
    std::snprintf(cell, sizeof(cell), format, values...);
    text += cell;
  };
  put("%-20s %6s", "question", "asked");
  for (const std::string& model : models) put(" %14s", model.c_str());
  put(" %14s %8s\n", "any old value", "chance");
  for (size_t k = 0; k < scores[0].size(); ++k) {
    put("%-20s %6lld", scores[0][k].question.c_str(), static_cast<long long>(scores[0][k].asked));
    for (const auto& of_model : scores) put(" %13.1f%%", 100 * of_model[k].recall);
    put(" %13.1f%% %7.1f%%\n", 100 * scores[0][k].any_value_of_key, 100 * scores[0][k].chance);
  }
  return text;
}

}  // namespace gdn
