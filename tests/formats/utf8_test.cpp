// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/utf8.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <string>

#include "gdn/base/rng.h"

namespace gdn {
namespace {

constexpr size_t kNone = std::string_view::npos;

std::string encode(char32_t c) {
  utf8proc_uint8_t bytes[4];
  const utf8proc_ssize_t n = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes);
  return std::string(reinterpret_cast<const char*>(bytes), static_cast<size_t>(n));
}

TEST(Utf8, EveryCodePointIsReadBack) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    const std::string bytes = encode(c);
    const Utf8Char read = read_utf8(bytes, 0);
    ASSERT_EQ(read.status, Utf8Status::kValid) << static_cast<uint32_t>(c);
    ASSERT_EQ(read.length, static_cast<int>(bytes.size()));
    ASSERT_EQ(read.code_point, c);
    for (size_t cut = 1; cut < bytes.size(); ++cut) {
      ASSERT_EQ(read_utf8(bytes.substr(0, cut), 0).status, Utf8Status::kIncomplete);
    }
  }
}

TEST(Utf8, NamesTheFirstInvalidByte) {
  EXPECT_EQ(find_invalid_utf8(""), kNone);
  EXPECT_EQ(find_invalid_utf8("plain ASCII that is longer than a word"), kNone);
  EXPECT_EQ(find_invalid_utf8("gr\xC3\xBC\xC3\x9F dich, \xF0\x9F\x98\x80"), kNone);
  const std::pair<std::string, size_t> bad[] = {
      {"caf\xE9 noir", 3},           // Latin-1
      {"0123456789abcdef\xFF", 16},  // behind two ASCII words
      {"ab\x80", 2},                 // a lone continuation byte
      {"a\xC0\xAF", 1},              // '/' in two bytes
      {"a\xC1\xBF", 1},              // overlong
      {"a\xE0\x9F\xBF", 1},          // overlong
      {"a\xED\xA0\x80", 1},          // a surrogate
      {"a\xF0\x8F\xBF\xBF", 1},      // overlong
      {"a\xF4\x90\x80\x80", 1},      // beyond U+10FFFF
      {"a\xF5\x80\x80\x80", 1},      // no such lead byte
      {"\xC3\xBC\xE2\x82", 2},       // ends inside a character
      {"\xE2\x82\x41", 0},           // a character broken off by a letter
  };
  for (const auto& [text, offset] : bad) EXPECT_EQ(find_invalid_utf8(text), offset) << text;
}

TEST(Utf8Stream, NeverPrintsHalfACharacter) {
  const std::string text = "na\xC3\xAFve \xE2\x82\xAC 5 \xF0\x9F\x98\x80!";
  Utf8Stream stream;
  std::string printed;
  for (const char c : text) {
    const std::string now = stream.push(std::string_view(&c, 1));
    EXPECT_EQ(find_invalid_utf8(now), kNone);
    printed += now;
  }
  EXPECT_EQ(printed, text);
  EXPECT_EQ(stream.flush(), "");
}

TEST(Utf8Stream, ReplacesWhatCannotBecomeACharacter) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("a\xFF"
                        "b"),
            "a\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(stream.push("\xE2\x82"), "");
  EXPECT_EQ(stream.push("x"), "\xEF\xBF\xBDx");  // one replacement for the broken off character
  EXPECT_EQ(stream.push("\xF0\x9F"), "");
  EXPECT_EQ(stream.flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.flush(), "");
}

TEST(Utf8Stream, AnyBytesInAnyPiecesGiveTheSameValidText) {
  Rng rng(7);
  for (int round = 0; round < 300; ++round) {
    std::string bytes;
    for (int i = 0; i < 40; ++i) {
      bytes += rng.below(2) ? encode(static_cast<char32_t>(rng.below(0xD800)))
                            : std::string(1, static_cast<char>(rng.below(256)));
    }
    Utf8Stream whole, pieces;
    std::string one = whole.push(bytes), many;
    one += whole.flush();
    for (size_t i = 0; i < bytes.size();) {
      const size_t n = 1 + rng.below(5);
      many += pieces.push(std::string_view(bytes).substr(i, n));
      i += n;
    }
    many += pieces.flush();
    EXPECT_EQ(one, many);
    EXPECT_EQ(find_invalid_utf8(one), kNone);
  }
}

}  // namespace
}  // namespace gdn
