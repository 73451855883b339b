// SPDX-License-Identifier: Apache-2.0
// The generated corpus of the demo: short stories in which people walk about and things change
// hands and places, e.g. "Anna entered the kitchen. The lamp came to Anna. Peter reached the
// kitchen. Anna gave the lamp over to Peter." In each chapter two people act; then come three
// questions whose answers need the latest of several overwritten facts of the story so far, "Where
// is Anna? kitchen" or "Who has the lamp? Peter", each on a line of its own, and often about those
// of whom nothing was told for long.
//
// A thing is taken only where it lies, handed over only between people in one place, and put down
// where its holder is, so that a story is a possible world. Every question is answered by one
// earlier sentence, the last that says where the person or thing is or who has it; all sentences
// about the same key before it are out of date.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/text/dataset.h"
#include "gdn/text/tokenizer.h"

namespace gdn {

enum class Question : uint8_t { kWhereIsPerson, kWhoHasThing, kWhereIsThing };
inline constexpr int kNumQuestions = 3;
std::string_view question_text(Question question);  // "Where is <person>?", ...

struct StoryAnswer {
  int64_t position;  // of the answer in Story::ids, >= 1; it is predicted from the question mark
                     // before it
  Question question;
};

struct Story {
  struct Range {
    int64_t begin, end;
  };
  std::vector<int32_t> ids;     // ends with <eos>
  std::vector<Range> chapters;  // in ids: the sentences of each chapter, without its questions
  std::vector<StoryAnswer> answers;
};

// The fixed vocabulary: a word tokenizer without <unk>.
std::unique_ptr<Tokenizer> make_story_tokenizer();

// A story of at most max_tokens tokens (at least kMinStoryTokens), a chapter for each 64 of them.
// Training stories are a function of (seed, index), held-out stories of the index alone. No
// held-out story's sentences are those of a training story: the hash of the sentences says to which
// of the two sets a story belongs.
inline constexpr int64_t kMinStoryTokens = 64;
Story make_training_story(int64_t max_tokens, uint64_t seed, uint64_t index);
Story make_held_out_story(int64_t max_tokens, uint64_t index);

// What guessing would score on these stories' questions, per question and over all (last entry).
struct GuessedRecall {
  // One of the people (places) that the story names, whichever of them is likelier: each as likely
  // as the others, or the one that the story names most often. It is the chance level: it has read
  // the story but asks for no key.
  std::array<double, kNumQuestions + 1> chance;
  // One of the values that the asked person or thing has had in this story, each as often as it had
  // it: a memory that adds up all facts of a key and cannot tell which came last.
  std::array<double, kNumQuestions + 1> any_value_of_key;
};
GuessedRecall guess_recall(const std::vector<Story>& stories);

}  // namespace gdn
