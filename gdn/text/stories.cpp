// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/stories.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/rng.h"
#include "gdn/text/shard.h"

namespace gdn {
namespace {

// The cast of the corpus; each story is about a few of each.
constexpr std::array<std::string_view, 10> kPeople = {
    " Anna", " Ben", " Clara", " Daniel", " Emma", " John", " Mary", " Peter", " Sandra", " Tom"};
constexpr std::array<std::string_view, 10> kThings = {
    " apple", " ball", " book", " coin", " cup", " hat", " key", " lamp", " letter", " ring"};
constexpr std::array<std::string_view, 8> kPlaces = {" attic",   " bakery",  " cellar", " garden",
                                                     " kitchen", " library", " stable", " tower"};
constexpr std::array<std::string_view, 2> kMoves = {" entered", " reached"};
constexpr std::array<std::string_view, 2> kTakes = {" went", " left"};
constexpr std::array<std::string_view, 2> kPuts = {" put", " dropped"};
constexpr std::array<std::string_view, 2> kGives = {" gave", " handed"};
constexpr int kPeopleInStory = 6, kThingsInStory = 4, kPlacesInStory = 6;
constexpr int kKeysInStory = kPeopleInStory + kThingsInStory;
constexpr int kActorsInChapter = 2;
constexpr int kQuestionsInChapter = 3;
constexpr int64_t kTokensInChapter = 64;

constexpr int64_t kLongestEvent = 8;     // Anna put the lamp in the attic .
constexpr int64_t kLongestQuestion = 7;  // \n Who has the lamp ? Anna
constexpr uint64_t kHeldOutSeed = 0x68656c64;
constexpr uint64_t kHeldOutOneIn = 16;
constexpr uint64_t kRowSeed = 0x726f77;
constexpr int64_t kMostStoriesInRow = 4;

struct Vocabulary {
  std::vector<std::string> words;
  int32_t eos, line, stop, ask, The, the, is, has, where, who, in, came, to, with, over;
  int32_t people, things, places, moves, takes, puts, gives;  // where the lists begin

  Vocabulary() {
    eos = add("<eos>"), line = add("\n"), stop = add("."), ask = add("?");
    where = add("Where"), who = add("Who");
    the = add(" the"), is = add(" is"), has = add(" has"), in = add(" in");
    The = add(" The"), came = add(" came"), to = add(" to"), with = add(" with"),
    over = add(" over");
    people = add(kPeople), things = add(kThings), places = add(kPlaces);
    moves = add(kMoves), takes = add(kTakes), puts = add(kPuts), gives = add(kGives);
  }

  int32_t add(std::string_view word) {
    words.emplace_back(word);
    return static_cast<int32_t>(words.size()) - 1;
  }
  template <size_t n>
  int32_t add(const std::array<std::string_view, n>& list) {
    const int32_t begin = static_cast<int32_t>(words.size());
    for (const std::string_view word : list) add(word);
    return begin;
  }
};

const Vocabulary& vocabulary() {
  static const Vocabulary vocabulary;
  return vocabulary;
}

// n different ids out of a list of `size` that begins at `begin`.
std::vector<int32_t> draw(Rng& rng, int32_t begin, size_t size, int n) {
  std::vector<int32_t> ids(size);
  std::iota(ids.begin(), ids.end(), begin);
  for (int i = 0; i < n; ++i) std::swap(ids[i], ids[i + rng.below(size - i)]);
  ids.resize(n);
  return ids;
}

// Writes one story: a world, what may happen in it next, and the sentences that tell it.
class Storyteller {
 public:
  Storyteller(int64_t max_tokens, uint64_t seed, uint64_t stream)
      : rng_(seed, stream),
        words_(vocabulary()),
        people_(draw(rng_, words_.people, kPeople.size(), kPeopleInStory)),
        things_(draw(rng_, words_.things, kThings.size(), kThingsInStory)),
        places_(draw(rng_, words_.places, kPlaces.size(), kPlacesInStory)),
        place_of_(kPeopleInStory, -1),
        things_at_(kThingsInStory),
        values_of_(kKeysInStory) {
    const int64_t chapters = max_tokens / kTokensInChapter;
    for (int64_t chapter = 1; chapter <= chapters; ++chapter) {
      // What follows the sentences: questions, a line end, and once <eos>.
      const int64_t room =
          max_tokens * chapter / chapters - kQuestionsInChapter * kLongestQuestion - 2;
      const int64_t begin = size();
      actors_ = draw(rng_, 0, kPeopleInStory, kActorsInChapter);
      told_.assign(kKeysInStory, false);
      while (size() + kLongestEvent <= room) tell_event();
      story_.chapters.push_back({begin, size()});
      ask_questions();
      say({words_.line});
    }
    say({words_.eos});
  }

  Story take() { return std::move(story_); }

 private:
  enum class Event : uint8_t { kMove, kFind, kTake, kPut, kGive };
  struct Choice {
    Event event;
    int person, thing, receiver;
    int weight;
  };
  // Where a thing is: nobody knows yet, with a person, or lying in a place.
  struct Whereabouts {
    int holder = -1;
    int32_t place = -1;
    int before = -1;      // who had it last; things do not go to and fro between the same hands,
    int32_t origin = -1;  // nor back to where they lay last
  };

  int64_t size() const { return static_cast<int64_t>(story_.ids.size()); }

  void say(std::initializer_list<int32_t> ids) { story_.ids.insert(story_.ids.end(), ids); }

  template <size_t n>
  int32_t one_of(int32_t begin, const std::array<std::string_view, n>&) {
    return begin + static_cast<int32_t>(rng_.below(n));
  }

  void tell_event() {
    choices_.clear();
    for (const int person : actors_) {
      choices_.push_back({Event::kMove, person, -1, -1, 6});
      if (place_of_[person] < 0) continue;
      for (int thing = 0; thing < kThingsInStory; ++thing) add_choices(person, thing);
    }
    int total = 0;
    for (const Choice& choice : choices_) total += choice.weight;
    int drawn = static_cast<int>(rng_.below(total));
    size_t i = 0;
    while (drawn >= choices_[i].weight) drawn -= choices_[i++].weight;
    happen(choices_[i]);
  }

  void add_choices(int person, int thing) {
    const Whereabouts& at = things_at_[thing];
    const int32_t here = place_of_[person];
    if (at.holder < 0 && at.place < 0) {
      choices_.push_back({Event::kFind, person, thing, -1, 1});
    } else if (at.place == here && at.before != person) {
      choices_.push_back({Event::kTake, person, thing, -1, 12});
    } else if (at.holder == person) {
      if (at.origin != here) choices_.push_back({Event::kPut, person, thing, -1, 8});
      for (int other = 0; other < kPeopleInStory; ++other) {
        if (other != person && other != at.before && place_of_[other] == here) {
          choices_.push_back({Event::kGive, person, thing, other, 12});
        }
      }
    }
  }

  void happen(const Choice& c) {
    const Vocabulary& w = words_;
    const int32_t who = people_[c.person], thing = c.thing < 0 ? -1 : things_[c.thing];
    switch (c.event) {
      case Event::kMove: {
        int32_t& place = place_of_[c.person];
        const int32_t before = place;
        while (place == before) place = places_[rng_.below(places_.size())];
        know(c.person, place);
        return say({who, one_of(w.moves, kMoves), w.the, place, w.stop});
      }
      case Event::kFind:
        hand(c.thing, c.person, -1, place_of_[c.person]);
        return say({w.The, thing, w.came, w.to, who, w.stop});
      case Event::kTake:
        hand(c.thing, c.person, things_at_[c.thing].before, place_of_[c.person]);
        return say({w.The, thing, one_of(w.takes, kTakes), w.with, who, w.stop});
      case Event::kPut: {
        const int32_t place = place_of_[c.person];
        things_at_[c.thing] = {-1, place, c.person, place};
        know(kPeopleInStory + c.thing, place);
        return say({who, one_of(w.puts, kPuts), w.the, thing, w.in, w.the, place, w.stop});
      }
      case Event::kGive:
        hand(c.thing, c.receiver, c.person, things_at_[c.thing].origin);
        return say({who, one_of(w.gives, kGives), w.the, thing, w.over, w.to, people_[c.receiver],
                    w.stop});
    }
  }

  void hand(int thing, int to, int from, int32_t origin) {
    things_at_[thing] = {to, -1, from, origin};
    know(kPeopleInStory + thing, people_[to]);
  }

  void know(int key, int32_t value) {
    values_of_[key].insert(value);
    told_[key] = true;
  }

  // Asks for people and things of which something is known. First come those whose last fact made
  // an earlier one out of date, and of these, in every other chapter, those that the chapter did
  // not mention, else the things.
  void ask_questions() {
    std::vector<int32_t> keys = draw(rng_, 0, kKeysInStory, kKeysInStory);
    std::erase_if(keys, [this](int32_t key) { return values_of_[key].empty(); });
    const bool old_first = rng_.below(2) == 0;
    const auto rank = [&](int32_t key) {
      const bool later = old_first ? told_[key] : key < kPeopleInStory;
      return (values_of_[key].size() > 1 ? 0 : 2) + (later ? 1 : 0);
    };
    std::stable_sort(keys.begin(), keys.end(),
                     [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
    keys.resize(std::min<size_t>(keys.size(), kQuestionsInChapter));
    for (size_t i = keys.size(); i > 1; --i) std::swap(keys[i - 1], keys[rng_.below(i)]);
    for (const int32_t key : keys) {
      if (key < kPeopleInStory) {
        ask(Question::kWhereIsPerson, {words_.where, words_.is, people_[key]}, place_of_[key]);
        continue;
      }
      const int32_t thing = key - kPeopleInStory;
      const Whereabouts& at = things_at_[thing];
      if (at.holder >= 0) {
        ask(Question::kWhoHasThing, {words_.who, words_.has, words_.the, things_[thing]},
            people_[at.holder]);
      } else {
        ask(Question::kWhereIsThing, {words_.where, words_.is, words_.the, things_[thing]},
            at.place);
      }
    }
  }

  void ask(Question question, std::initializer_list<int32_t> ids, int32_t answer) {
    say({words_.line});
    say(ids);
    say({words_.ask});
    story_.answers.push_back({size(), question});
    say({answer});
  }

  Rng rng_;
  const Vocabulary& words_;
  std::vector<int32_t> people_, things_, places_;
  std::vector<int32_t> place_of_;  // of each person; -1: nowhere yet
  std::vector<Whereabouts> things_at_;
  std::vector<std::set<int32_t>> values_of_;  // of each person, then each thing: all it ever had
  std::vector<int32_t> actors_;               // who acts in this chapter
  std::vector<bool> told_;  // of each key: whether this chapter says something about it
  std::vector<Choice> choices_;
  Story story_;
};

// The hash of a story's sentences decides which set it belongs to.
bool is_held_out(const Story& story) {
  uint64_t hash = 0;
  for (const Story::Range& chapter : story.chapters) {
    const char* sentences = reinterpret_cast<const char*>(story.ids.data() + chapter.begin);
    hash = hash_bytes(
        {sentences, static_cast<size_t>(chapter.end - chapter.begin) * sizeof(int32_t)}, hash);
  }
  return hash % kHeldOutOneIn == 0;
}

// The first story of the wanted set among those drawn for (seed, index).
Story make_story(int64_t max_tokens, uint64_t seed, uint64_t index, bool held_out) {
  GDN_CHECK(max_tokens >= kMinStoryTokens, "[stories] a story needs at least ", kMinStoryTokens,
            " tokens, got ", max_tokens, "; raise seq_len");
  for (uint64_t attempt = 0;; ++attempt) {
    Story story = Storyteller(max_tokens, seed ^ hash_bytes({}, attempt), index).take();
    if (is_held_out(story) == held_out) return story;
  }
}

// Sums that guess_recall averages.
class GuessCounter {
 public:
  void add(const Story& story) {
    Counts named;                   // how often the story so far names each word
    std::map<int32_t, Counts> had;  // how often each person or thing had each value
    size_t chapter = 0;
    for (const StoryAnswer& answer : story.answers) {
      for (; chapter < story.chapters.size() && story.chapters[chapter].begin < answer.position;
           ++chapter) {
        read(story, story.chapters[chapter], named, had);
      }
      const int32_t truth = story.ids[answer.position], key = story.ids[answer.position - 2];
      add_question(answer.question, truth, named, had[key]);
    }
  }

  GuessedRecall means() const {
    GuessedRecall out{};
    for (size_t i = 0; i <= kNumQuestions; ++i) {
      if (asked_[i] == 0) continue;
      out.chance[i] = std::max(any_[i], most_named_[i]) / asked_[i];
      out.any_value_of_key[i] = of_key_[i] / asked_[i];
    }
    return out;
  }

 private:
  using Counts = std::map<int32_t, int64_t>;

  static bool is_in(int32_t id, int32_t begin, size_t size) {
    return id >= begin && id < begin + static_cast<int32_t>(size);
  }

  // Each sentence ends with a fact: a person or thing, two words between, its new value.
  static void read(const Story& story, Story::Range chapter, Counts& named,
                   std::map<int32_t, Counts>& had) {
    for (int64_t begin = chapter.begin; begin < chapter.end;) {
      int64_t end = begin;
      while (story.ids[end] != vocabulary().stop) ++named[story.ids[end++]];
      ++had[story.ids[end - 4]][story.ids[end - 1]];
      begin = end + 1;
    }
  }

  void add_question(Question question, int32_t truth, const Counts& named, const Counts& had) {
    const Vocabulary& w = vocabulary();
    const bool person = question == Question::kWhoHasThing;
    const int32_t low = person ? w.people : w.places;
    const size_t size = person ? kPeople.size() : kPlaces.size();
    double candidates = 0, most_named = 0, values = 0;
    int64_t most = 0;
    for (const auto& [id, count] : named) {
      if (!is_in(id, low, size)) continue;
      ++candidates;
      if (count > most) most = count, most_named = 0;
      most_named += count == most;
    }
    for (const auto& [value, count] : had) values += static_cast<double>(count);
    for (const size_t i : {static_cast<size_t>(question), static_cast<size_t>(kNumQuestions)}) {
      ++asked_[i];
      any_[i] += 1 / candidates;
      most_named_[i] += named.at(truth) == most ? 1 / most_named : 0;
      of_key_[i] += static_cast<double>(had.at(truth)) / values;
    }
  }

  std::array<double, kNumQuestions + 1> asked_{}, any_{}, most_named_{}, of_key_{};
};

class StorySource final : public BatchSource {
 public:
  explicit StorySource(const StoryDataOptions& options)
      : options_(options), tokenizer_(make_story_tokenizer()) {
    const auto require = [](bool ok, const auto&... message) {
      if (!ok) throw UsageError(str_cat("[stories] ", message...));
    };
    require(options.batch_size >= 1, "batch_size must be at least 1, got ", options.batch_size);
    require(options.seq_len >= kMinStoryTokens, "seq_len must be at least ", kMinStoryTokens,
            ", got ", options.seq_len);
    require(options.val_stories >= 0, "val_stories must not be negative, got ",
            options.val_stories);
    require(options.text_fraction >= 0 && options.text_fraction <= 1,
            "text_fraction must be in [0, 1], got ", options.text_fraction);
  }

  const Tokenizer& tokenizer() const override { return *tokenizer_; }

  Batch train_batch(int64_t index) const override {
    Batch batch = empty(1, options_.batch_size * options_.seq_len);
    batch.cu_seqlens = {0};
    for (int64_t row = 0; row < options_.batch_size; ++row) {
      const int64_t number = index * options_.batch_size + row;
      int64_t stories = int64_t{1} << Rng(options_.seed ^ kRowSeed, number).below(3);
      while (options_.seq_len / stories < kMinStoryTokens) stories /= 2;
      for (int64_t i = 0; i < stories; ++i) {
        const int64_t room = options_.seq_len * (i + 1) / stories - options_.seq_len * i / stories;
        const int64_t which = number * kMostStoriesInRow + i;
        add(batch, make_training_story(room, options_.seed, which), room, options_.seed, which);
        batch.cu_seqlens.push_back(static_cast<int64_t>(batch.ids.size()));
      }
    }
    return batch;
  }

  int64_t num_val_batches() const override {
    return (options_.val_stories + options_.batch_size - 1) / options_.batch_size;
  }

  Batch val_batch(int64_t index) const override {
    GDN_CHECK(index >= 0 && index < num_val_batches(), "[stories] validation batch ", index, " of ",
              num_val_batches());
    const int64_t first = index * options_.batch_size;
    Batch batch =
        empty(std::min(options_.batch_size, options_.val_stories - first), options_.seq_len);
    for (int64_t row = 0; row < batch.B; ++row) {
      add(batch, make_held_out_story(options_.seq_len, first + row), options_.seq_len, kHeldOutSeed,
          first + row);
    }
    return batch;
  }

  std::string describe() const override {
    return str_cat("stories of up to ", options_.seq_len, " tokens, vocabulary ",
                   tokenizer_->vocab_size(), ", seed ", options_.seed, ", ", options_.val_stories,
                   " held out");
  }

 private:
  static Batch empty(int64_t B, int64_t T) {
    Batch batch{.B = B, .T = T, .ids = {}, .targets = {}, .cu_seqlens = {}, .answers = {}};
    const size_t size = static_cast<size_t>(B * T);
    batch.ids.reserve(size), batch.targets.reserve(size), batch.answers.reserve(size);
    return batch;
  }

  // Appends `room` tokens: the story without its last one, padded with <eos>. Scored are the
  // answers and a random part of the other tokens.
  void add(Batch& batch, const Story& story, int64_t room, uint64_t seed, uint64_t number) const {
    Rng rng(~seed, number);
    const size_t begin = batch.ids.size();
    for (size_t i = 0; i + 1 < story.ids.size(); ++i) {
      batch.ids.push_back(story.ids[i]);
      batch.targets.push_back(rng.uniform() < options_.text_fraction ? story.ids[i + 1] : -100);
    }
    const size_t end = begin + static_cast<size_t>(room);
    batch.ids.resize(end, tokenizer_->eos_id());
    batch.targets.resize(end, -100);
    batch.answers.resize(end, 0);
    for (const StoryAnswer& answer : story.answers) {
      batch.targets[begin + answer.position - 1] = story.ids[answer.position];
      batch.answers[begin + answer.position - 1] = 1;
    }
  }

  StoryDataOptions options_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace

std::string_view question_text(Question question) {
  constexpr std::array<std::string_view, kNumQuestions> kTexts = {
      "Where is <person>?", "Who has <thing>?", "Where is <thing>?"};
  return kTexts[static_cast<size_t>(question)];
}

std::unique_ptr<Tokenizer> make_story_tokenizer() {
  return make_word_tokenizer(vocabulary().words);
}

Story make_training_story(int64_t max_tokens, uint64_t seed, uint64_t index) {
  return make_story(max_tokens, seed, index, false);
}

Story make_held_out_story(int64_t max_tokens, uint64_t index) {
  return make_story(max_tokens, kHeldOutSeed, index, true);
}

GuessedRecall guess_recall(const std::vector<Story>& stories) {
  GuessCounter counter;
  for (const Story& story : stories) counter.add(story);
  return counter.means();
}

std::unique_ptr<BatchSource> make_story_source(const StoryDataOptions& options) {
  return std::make_unique<StorySource>(options);
}

}  // namespace gdn
