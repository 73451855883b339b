// SPDX-License-Identifier: Apache-2.0
// UTF-8, read strictly: no overlong forms, no surrogates, nothing above U+10FFFF (Unicode 15, table
// 3-7).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace gdn {

enum class Utf8Status : uint8_t {
  kValid,       // `length` bytes are one character
  kInvalid,     // `length` bytes can never become part of a valid character
  kIncomplete,  // the text ends inside a character that is valid so far
};

struct Utf8Char {
  Utf8Status status;
  int length;           // >= 1
  char32_t code_point;  // of a valid character
};

// The character that starts at text[offset]; offset < text.size().
Utf8Char read_utf8(std::string_view text, size_t offset);

// The offset of the first byte that is not valid UTF-8, or npos.
size_t find_invalid_utf8(std::string_view text);

// Cuts a stream of token bytes at character boundaries, so that a half character is never printed.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);  // what can be printed now
  std::string flush();                       // the rest; invalid bytes as U+FFFD

 private:
  std::string pending_;
};

}  // namespace gdn
