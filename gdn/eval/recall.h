// SPDX-License-Identifier: Apache-2.0
// Recall of a language model on the generated stories: of how many questions it names the answer,
// the latest fact.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gdn/model/causal_lm.h"
#include "gdn/text/stories.h"

namespace gdn {

// For each story the words that the model answers with, in the order of its questions: the
// likeliest next token behind each question mark, everything before it (earlier answers, too) being
// as in the story.
std::vector<std::vector<int32_t>> answer_stories(CausalLM& model, const std::vector<Story>& stories,
                                                 int64_t batch_size = 32);

struct RecallScore {
  std::string question;  // "Where is <person>?", ..., "all"
  int64_t asked = 0;
  double recall = 0;            // share answered rightly
  double chance = 0;            // GuessedRecall::chance
  double any_value_of_key = 0;  // GuessedRecall::any_value_of_key
};

// Per question, and over all in the last entry.
std::vector<RecallScore> score_recall(const std::vector<Story>& stories,
                                      const std::vector<std::vector<int32_t>>& answers);

// Held-out stories number first, first + 1, ...
std::vector<Story> held_out_stories(int64_t max_tokens, int64_t first, int64_t count);

// The scores as a table of text, one model per column: `models` names them, `scores` holds
// score_recall of each on the same stories.
std::string recall_table(const std::vector<std::string>& models,
                         const std::vector<std::vector<RecallScore>>& scores);

}  // namespace gdn
