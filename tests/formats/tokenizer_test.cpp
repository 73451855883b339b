// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "gdn/base/check.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenizerFile : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("gdn-tokenizer-" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  void write(const std::string& content) { std::ofstream(folder_ / "tokenizer.json") << content; }
  std::string load_error() {
    try {
      load_tokenizer(folder_);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST(ByteTokenizer, AnyTextRoundTrips) {
  std::string text;
  for (int i = 0; i < 256; ++i) text += static_cast<char>(i);
  const auto tokenizer = make_byte_tokenizer();
  const std::vector<int32_t> ids = tokenizer->encode(text);
  ASSERT_EQ(ids.size(), 256u);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(ids[i], i);
  EXPECT_EQ(tokenizer->decode(ids), text);
  EXPECT_EQ(tokenizer->vocab_size(), 256);
  EXPECT_EQ(tokenizer->eos_id(), -1);
  EXPECT_THROW(tokenizer->token_bytes(256), Error);
}

TEST(WordTokenizer, SplitsWordsPunctuationAndWhiteSpace) {
  EXPECT_THAT(split_words("Don't panic, it is\n\n  4 o\xE2\x80\x99"
                          "clock (na\xC3\xAFve)."),
              ElementsAre("Don't", " panic", ",", " it", " is", "\n", "\n", " ", " 4",
                          " o\xE2\x80\x99"
                          "clock",
                          " (", "na\xC3\xAFve", ")", "."));
  EXPECT_THAT(split_words("a \t b "), ElementsAre("a", " ", "\t", " b", " "));
  EXPECT_THAT(split_words(""), ElementsAre());
}

TEST(WordTokenizer, TrainedOnATextItRoundTripsIt) {
  const std::string text = "The cat sat.\nThe dog sat on the cat, and the cat -- oh! -- ran.\n";
  const auto tokenizer = train_word_tokenizer(text, 1000);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  EXPECT_EQ(tokenizer->eos_id(), 1);
  EXPECT_EQ(tokenizer->token_bytes(1), "");
}

TEST(WordTokenizer, KeepsTheMostFrequentWordsAndMarksTheOthers) {
  const auto tokenizer = train_word_tokenizer(" b b b a a c c d", 3);
  ASSERT_EQ(tokenizer->vocab_size(), 5);
  EXPECT_EQ(tokenizer->token_bytes(2), " b");
  EXPECT_EQ(tokenizer->token_bytes(3), " a");  // equally frequent words in the order of their bytes
  EXPECT_EQ(tokenizer->token_bytes(4), " c");
  EXPECT_THAT(tokenizer->encode(" b d c"), ElementsAre(2, 0, 4));
}

TEST(WordTokenizer, AWordStandsForItselfWithAndWithoutItsSpace) {
  const auto tokenizer = make_word_tokenizer({"Where", " is", " Mary", "?"});
  EXPECT_THAT(tokenizer->encode("Where is Mary?"), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(tokenizer->encode(" Where is"), ElementsAre(0, 1));
  EXPECT_THAT(tokenizer->encode("Mary is"), ElementsAre(2, 1));
}

TEST(WordTokenizer, RefusesAnUnknownWordWithoutUnkByName) {
  const auto tokenizer = make_word_tokenizer({"a", "b"});
  try {
    tokenizer->encode("a zebra");
    FAIL() << "an unknown word was accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("zebra"));
  }
  EXPECT_THROW(make_word_tokenizer({"a", "b", "a"}), Error);
  EXPECT_THROW(make_word_tokenizer({}), Error);
  EXPECT_THROW(tokenizer->token_bytes(-1), Error);
}

TEST_F(TokenizerFile, SavedTokenizersComeBack) {
  make_byte_tokenizer()->save(folder_ / "byte" / "deep");
  EXPECT_EQ(load_tokenizer(folder_ / "byte" / "deep")->type(), "byte");

  const std::string text = "Gr\xC3\xBC\xC3\x9F Gott, \"quoted\" \\ words\n";
  const auto word = train_word_tokenizer(text, 100);
  word->save(folder_);
  const auto loaded = load_tokenizer(folder_);
  EXPECT_EQ(loaded->type(), "word");
  EXPECT_EQ(loaded->vocab_size(), word->vocab_size());
  EXPECT_EQ(loaded->eos_id(), word->eos_id());
  EXPECT_EQ(loaded->encode(text), word->encode(text));
}

TEST_F(TokenizerFile, BadFilesAreRefusedWithTheirPath) {
  const std::string path = (folder_ / "tokenizer.json").string();
  EXPECT_THAT(load_error(), HasSubstr(path));  // missing
  for (const char* bad : {"", "{", "[]", "null", R"({"type":"byte"})",
                          R"({"format":"gdn-tokenizer","version":2,"type":"byte"})",
                          R"({"format":"gdn-tokenizer","version":1,"type":"bpe"})",
                          R"({"format":"gdn-tokenizer","version":1})",
                          R"({"format":"gdn-tokenizer","version":1,"type":"word"})",
                          R"({"format":"gdn-tokenizer","version":1,"type":"word","words":["a",1]})",
                          R"({"format":{},"version":[],"type":3})"}) {
    write(bad);
    EXPECT_THAT(load_error(), HasSubstr(path)) << bad;
  }
}

}  // namespace
}  // namespace gdn
