// SPDX-License-Identifier: Apache-2.0
// Stories are checked from their text alone, by a reader that shares no code with the storyteller.
#include "gdn/text/stories.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>

#include "gdn/base/check.h"
#include "gdn/text/shard.h"

namespace gdn {
namespace {

const std::set<std::string> kPeople = {"Anna", "Ben",  "Clara", "Daniel", "Emma",
                                       "John", "Mary", "Peter", "Sandra", "Tom"};
const std::set<std::string> kPlaces = {"attic",   "bakery",  "cellar", "garden",
                                       "kitchen", "library", "stable", "tower"};

std::string text_of(const Story& story) { return make_story_tokenizer()->decode(story.ids); }

struct AskedQuestion {
  std::string key, answer, known;  // what the story says and what the reader knows
  Question question;
  std::map<std::string, int> named, had;  // so far: every word; the values of the key
};

// Reads a story's text and follows its world. Breaches of the story's rules end up in `errors`.
struct Reader {
  std::map<std::string, std::string> where, holder,
      lies;  // person: place; thing: person; thing: place
  std::map<std::string, std::map<std::string, int>> had;
  std::map<std::string, int> named;
  std::vector<AskedQuestion> questions;
  std::vector<std::string> errors;
  int sentences = 0;

  explicit Reader(const std::string& text) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      if (line.find('?') != std::string::npos) {
        read_question(line);
      } else {
        std::istringstream parts(line);
        for (std::string sentence; std::getline(parts, sentence, '.');) read_sentence(sentence);
      }
    }
  }

  void require(bool ok, const std::string& what) {
    if (!ok) errors.push_back(what);
  }

  static std::vector<std::string> words(const std::string& text) {
    std::istringstream in(text);
    std::vector<std::string> out;
    for (std::string word; in >> word;) out.push_back(word);
    return out;
  }

  void set_holder(const std::string& thing, const std::string& person) {
    lies.erase(thing);
    holder[thing] = person;
    ++had[thing][person];
  }

  void read_sentence(const std::string& sentence) {
    const std::vector<std::string> w = words(sentence);
    require(w.size() >= 4 && (kPeople.count(w[0]) || w[0] == "The"), "no sentence: " + sentence);
    if (w.size() < 4) return;
    ++sentences;
    for (const std::string& word : w) ++named[word];
    const std::string &first = w[0], &second = w[1], &last = w.back();
    if (first == "The") {  // The lamp came to Anna. The lamp left with Anna.
      require(w.size() == 5 && kPeople.count(last), "to nobody: " + sentence);
      if (w[3] == "to") {
        require(w[2] == "came" && !holder.count(second) && !lies.count(second),
                "was not lost: " + sentence);
      } else {
        require((w[2] == "went" || w[2] == "left") && w[3] == "with", "unknown: " + sentence);
        require(lies.count(second) && lies[second] == where[last], "out of reach: " + sentence);
      }
      set_holder(second, last);
    } else if (second == "entered" || second == "reached") {
      require(w.size() == 4 && kPlaces.count(last) && where[first] != last,
              "goes nowhere: " + sentence);
      where[first] = last;
      ++had[first][last];
    } else if (second == "gave" || second == "handed") {
      require(w.size() == 7 && w[4] == "over" && kPeople.count(last) && last != first,
              "to nobody: " + sentence);
      require(holder[w[3]] == first && where[last] == where[first], "cannot give: " + sentence);
      set_holder(w[3], last);
    } else {
      require((second == "put" || second == "dropped") && w.size() == 7 && w[4] == "in",
              "unknown: " + sentence);
      require(holder[w[3]] == first && where[first] == last, "cannot put: " + sentence);
      holder.erase(w[3]);
      lies[w[3]] = last;
      ++had[w[3]][last];
    }
  }

  void read_question(const std::string& line) {
    const size_t mark = line.find('?');
    const std::vector<std::string> w = words(line.substr(0, mark));
    AskedQuestion q;
    q.key = w.back();
    q.answer = words(line.substr(mark + 1)).at(0);
    if (w[0] == "Who") {
      q.question = Question::kWhoHasThing;
      q.known = holder.count(q.key) ? holder[q.key] : "?";
    } else if (kPeople.count(q.key)) {
      q.question = Question::kWhereIsPerson;
      q.known = where.count(q.key) ? where[q.key] : "?";
    } else {
      q.question = Question::kWhereIsThing;
      q.known = lies.count(q.key) ? lies[q.key] : "?";
    }
    q.named = named;
    q.had = had[q.key];
    questions.push_back(q);
  }
};

std::vector<Story> some_stories(int64_t max_tokens, int count) {
  std::vector<Story> stories;
  for (int i = 0; i < count; ++i) {
    stories.push_back(i % 2 ? make_held_out_story(max_tokens, i)
                            : make_training_story(max_tokens, 5, i));
  }
  return stories;
}

TEST(Stories, TellAPossibleWorldAndAnswerFromItsLatestFacts) {
  for (const int64_t max_tokens : {64, 100, 192, 193, 500}) {
    for (const Story& story : some_stories(max_tokens, 200)) {
      const std::string text = text_of(story);
      const Reader reader(text);
      ASSERT_THAT(reader.errors, ::testing::IsEmpty()) << text;
      ASSERT_EQ(reader.questions.size(), story.answers.size());
      for (size_t i = 0; i < story.answers.size(); ++i) {
        const AskedQuestion& q = reader.questions[i];
        EXPECT_EQ(q.answer, q.known) << q.key << " in:\n" << text;
        EXPECT_EQ(q.question, story.answers[i].question);
        EXPECT_EQ(make_story_tokenizer()->token_bytes(story.ids[story.answers[i].position]),
                  " " + q.answer);
      }
      EXPECT_GE(reader.sentences, 3 * max_tokens / 64);
      EXPECT_EQ(static_cast<int64_t>(story.chapters.size()), max_tokens / 64);
    }
  }
}

TEST(Stories, FitAndUseTheRoomTheyAreGiven) {
  for (const int64_t max_tokens : {64, 65, 127, 128, 192, 1000}) {
    for (const Story& story : some_stories(max_tokens, 200)) {
      EXPECT_LE(static_cast<int64_t>(story.ids.size()), max_tokens);
      EXPECT_GE(static_cast<int64_t>(story.ids.size()), max_tokens - 24);
      EXPECT_GE(story.answers.size(), static_cast<size_t>(max_tokens / 64));
      EXPECT_EQ(story.ids.back(), make_story_tokenizer()->eos_id());
    }
  }
  EXPECT_THROW(make_training_story(63, 1, 1), Error);
}

TEST(Stories, FactsAreOverwrittenSeveralTimes) {
  std::array<int, kNumQuestions> asked{};
  double writes = 0, stale = 0, questions = 0;
  for (const Story& story : some_stories(192, 400)) {
    for (const AskedQuestion& q : Reader(text_of(story)).questions) {
      ++asked[static_cast<size_t>(q.question)];
      ++questions;
      stale += q.had.size() > 1;
      for (const auto& [value, count] : q.had) writes += count;
    }
  }
  EXPECT_GT(writes / questions, 2.0);
  EXPECT_GT(stale / questions, 0.6) << "share of questions with a stale answer to fall for";
  for (const int count : asked)
    EXPECT_GT(count, 0.1 * questions) << "every question is asked often";
}

TEST(Stories, AreAFunctionOfSeedAndIndex) {
  EXPECT_EQ(make_training_story(192, 3, 9).ids, make_training_story(192, 3, 9).ids);
  EXPECT_NE(make_training_story(192, 3, 9).ids, make_training_story(192, 3, 10).ids);
  EXPECT_NE(make_training_story(192, 3, 9).ids, make_training_story(192, 4, 9).ids);
  std::set<std::vector<int32_t>> seen;
  for (int i = 0; i < 3000; ++i) {
    seen.insert(make_training_story(192, 3, i).ids);
    seen.insert(make_held_out_story(192, i).ids);
  }
  EXPECT_EQ(seen.size(), 6000u) << "stories repeat";
}

// Any two sets of a few thousand stories would differ by luck, so the rule itself is checked: the
// sentences' hash.
TEST(Stories, TheSentencesDecideWhetherAStoryIsHeldOut) {
  const auto group = [](const Story& story) {
    uint64_t hash = 0;
    for (const auto& [begin, end] : story.chapters) {
      const char* bytes = reinterpret_cast<const char*>(story.ids.data() + begin);
      hash = hash_bytes({bytes, static_cast<size_t>(end - begin) * sizeof(int32_t)}, hash);
    }
    return hash % 16;
  };
  std::set<uint64_t> training;
  for (int i = 0; i < 2000; ++i) {
    EXPECT_EQ(group(make_held_out_story(192, i)), 0u);
    training.insert(group(make_training_story(192, i % 3, i)));
  }
  EXPECT_EQ(training.size(), 15u);
  EXPECT_EQ(training.count(0), 0u);
}

TEST(Stories, TheVocabularyReadsItsOwnTextBack) {
  const auto tokenizer = make_story_tokenizer();
  EXPECT_EQ(tokenizer->type(), "word");
  EXPECT_LT(tokenizer->vocab_size(), 64);
  for (const Story& story : some_stories(192, 50)) {
    std::vector<int32_t> ids = tokenizer->encode(text_of(story));
    ids.push_back(tokenizer->eos_id());
    EXPECT_EQ(ids, story.ids);
  }
  EXPECT_EQ(tokenizer->encode("Anna entered the tower.\nWhere is Anna?").size(), 10u);
  EXPECT_THROW(tokenizer->encode("Zoe entered the kitchen."), Error);
}

TEST(Stories, GuessesScoreWhatAReaderCounts) {
  const std::vector<Story> stories = some_stories(192, 300);
  std::array<double, kNumQuestions + 1> asked{}, any{}, most_named{}, of_key{};
  for (const Story& story : stories) {
    for (const AskedQuestion& q : Reader(text_of(story)).questions) {
      const auto& kind = q.question == Question::kWhoHasThing ? kPeople : kPlaces;
      std::vector<int> counts;
      for (const auto& [word, count] : q.named) {
        if (kind.count(word)) counts.push_back(count);
      }
      const int most = *std::max_element(counts.begin(), counts.end());
      double total = 0;
      for (const auto& [value, count] : q.had) total += count;
      for (const size_t i : {static_cast<size_t>(q.question), size_t{kNumQuestions}}) {
        asked[i] += 1;
        any[i] += 1.0 / static_cast<double>(counts.size());
        if (q.named.at(q.answer) == most) {
          most_named[i] +=
              1.0 / static_cast<double>(std::count(counts.begin(), counts.end(), most));
        }
        of_key[i] += q.had.at(q.answer) / total;
      }
    }
  }
  const GuessedRecall guessed = guess_recall(stories);
  for (size_t i = 0; i <= kNumQuestions; ++i) {
    EXPECT_NEAR(guessed.chance[i], std::max(any[i], most_named[i]) / asked[i], 1e-12);
    EXPECT_NEAR(guessed.any_value_of_key[i], of_key[i] / asked[i], 1e-12);
  }
  EXPECT_LT(guessed.chance[kNumQuestions], 0.45);
  EXPECT_LT(guessed.any_value_of_key[kNumQuestions], 0.55);
}

// The story behind a sequence of a batch: its tokens but the last one. Checks its targets.
struct Scored {
  int64_t answers = 0, other = 0, scored_other = 0;
};
Scored check_row(const Batch& batch, int64_t begin, int64_t end, const Story& story) {
  Scored scored;
  std::set<int64_t> answers;
  for (const StoryAnswer& answer : story.answers) answers.insert(answer.position);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = i - begin + 1;
    if (next >= static_cast<int64_t>(story.ids.size())) {
      EXPECT_EQ(batch.targets[i], -100) << "padding is not scored";
      EXPECT_EQ(batch.answers[i], 0);
      continue;
    }
    EXPECT_EQ(batch.ids[i], story.ids[next - 1]);
    EXPECT_EQ(batch.answers[i], answers.count(next));
    const bool is_scored = batch.targets[i] != -100;
    if (is_scored) {
      EXPECT_EQ(batch.targets[i], story.ids[next]);
    }
    if (answers.count(next)) {
      EXPECT_TRUE(is_scored);
      ++scored.answers;
    } else {
      ++scored.other;
      scored.scored_other += is_scored;
    }
  }
  return scored;
}

TEST(StorySource, TrainingRowsAreOneTwoOrFourStoriesWithTheirAnswersScored) {
  StoryDataOptions options;
  options.batch_size = 5;
  options.seq_len = 258;
  options.text_fraction = 0.25;
  const auto source = make_story_source(options);
  double other = 0, scored_other = 0;
  std::map<int64_t, int> rooms;
  for (int64_t index = 0; index < 40; ++index) {
    const Batch batch = source->train_batch(index);
    ASSERT_EQ(batch.B, 1);
    ASSERT_EQ(batch.T, 5 * 258);
    ASSERT_EQ(batch.ids.size(), 5u * 258);
    ASSERT_EQ(batch.targets.size(), batch.ids.size());
    ASSERT_EQ(batch.answers.size(), batch.ids.size());
    ASSERT_EQ(batch.cu_seqlens.front(), 0);
    ASSERT_EQ(batch.cu_seqlens.back(), batch.T);
    for (size_t n = 0, in_row = 0; n + 1 < batch.cu_seqlens.size(); ++n) {
      const int64_t begin = batch.cu_seqlens[n], end = batch.cu_seqlens[n + 1], row = begin / 258;
      in_row = begin % 258 == 0 ? 0 : in_row + 1;
      const Story story =
          make_training_story(end - begin, options.seed, (index * 5 + row) * 4 + in_row);
      const Scored scored = check_row(batch, begin, end, story);
      EXPECT_EQ(scored.answers, static_cast<int64_t>(story.answers.size()));
      other += static_cast<double>(scored.other);
      scored_other += static_cast<double>(scored.scored_other);
      ++rooms[end - begin];
    }
  }
  EXPECT_NEAR(scored_other / other, 0.25, 0.02);
  ASSERT_EQ(rooms.size(), 4u) << "258, 129, and 64 or 65";
  for (const auto& [room, count] : rooms) EXPECT_GT(count, 40);
}

TEST(StorySource, ValidationIsTheHeldOutStoriesWhateverTheSeed) {
  StoryDataOptions options;
  options.batch_size = 8;
  options.val_stories = 21;
  options.text_fraction = 0;
  const auto source = make_story_source(options);
  options.seed = 99;
  const auto other = make_story_source(options);
  ASSERT_EQ(source->num_val_batches(), 3);
  int64_t rows = 0;
  for (int64_t i = 0; i < 3; ++i) {
    const Batch batch = source->val_batch(i);
    EXPECT_EQ(batch.ids, other->val_batch(i).ids);
    EXPECT_EQ(batch.targets, other->val_batch(i).targets);
    EXPECT_EQ(batch.num_scored(), std::count(batch.answers.begin(), batch.answers.end(), 1));
    for (int64_t row = 0; row < batch.B; ++row, ++rows) {
      const Story story = make_held_out_story(options.seq_len, rows);
      EXPECT_TRUE(
          std::equal(story.ids.begin(), story.ids.end() - 1, batch.ids.begin() + row * batch.T));
    }
  }
  EXPECT_EQ(rows, 21);
  EXPECT_NE(source->train_batch(0).ids, other->train_batch(0).ids);
  EXPECT_THROW(source->val_batch(3), Error);
}

TEST(StorySource, RefusesWhatItCannotDo) {
  const auto made_with = [](auto change) {
    StoryDataOptions options;
    change(options);
    return make_story_source(options);
  };
  EXPECT_THROW(made_with([](auto& o) { o.seq_len = 63; }), UsageError);
  EXPECT_THROW(made_with([](auto& o) { o.batch_size = 0; }), UsageError);
  EXPECT_THROW(made_with([](auto& o) { o.val_stories = -1; }), UsageError);
  EXPECT_THROW(made_with([](auto& o) { o.text_fraction = 1.5; }), UsageError);
}

}  // namespace
}  // namespace gdn
