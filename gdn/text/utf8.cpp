// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/utf8.h"

#include <cstring>

namespace gdn {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// What the first byte of a character says: its length, the bits it holds, and which second bytes it
// allows.
struct Lead {
  int length;
  char32_t bits;
  uint8_t second_low, second_high;
};

Lead read_lead(uint8_t byte) {
  if (byte < 0x80) return {1, byte, 0, 0};
  if (byte < 0xC2) return {0, 0, 0, 0};  // a continuation byte, or an overlong form of ASCII
  if (byte < 0xE0) return {2, byte & 0x1Fu, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0, 0xA0, 0xBF};    // below: overlong
  if (byte == 0xED) return {3, 0xD, 0x80, 0x9F};  // above: surrogates
  if (byte < 0xF0) return {3, byte & 0xFu, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0, 0x90, 0xBF};  // below: overlong
  if (byte < 0xF4) return {4, byte & 0x7u, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 4, 0x80, 0x8F};  // above: beyond U+10FFFF
  return {0, 0, 0, 0};
}

}  // namespace

Utf8Char read_utf8(std::string_view text, size_t offset) {
  const Lead lead = read_lead(static_cast<uint8_t>(text[offset]));
  if (lead.length == 0) return {Utf8Status::kInvalid, 1, 0};
  char32_t code_point = lead.bits;
  for (int i = 1; i < lead.length; ++i) {
    if (offset + i >= text.size()) return {Utf8Status::kIncomplete, i, 0};
    const uint8_t byte = static_cast<uint8_t>(text[offset + i]);
    const uint8_t low = i == 1 ? lead.second_low : 0x80, high = i == 1 ? lead.second_high : 0xBF;
    if (byte < low || byte > high) return {Utf8Status::kInvalid, i, 0};
    code_point = code_point << 6 | (byte & 0x3Fu);
  }
  return {Utf8Status::kValid, lead.length, code_point};
}

size_t find_invalid_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    if (i + 8 <= text.size()) {  // eight ASCII bytes at a time
      uint64_t word;
      std::memcpy(&word, text.data() + i, 8);
      if ((word & 0x8080808080808080ull) == 0) {
        i += 8;
        continue;
      }
    }
    const Utf8Char c = read_utf8(text, i);
    if (c.status != Utf8Status::kValid) return i;
    i += c.length;
  }
  return std::string_view::npos;
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  size_t i = 0;
  while (i < pending_.size()) {
    const Utf8Char c = read_utf8(pending_, i);
    if (c.status == Utf8Status::kIncomplete) break;
    if (c.status == Utf8Status::kValid) {
      out.append(pending_, i, c.length);
    } else {
      out += kReplacement;
    }
    i += c.length;
  }
  pending_.erase(0, i);
  return out;
}

std::string Utf8Stream::flush() {
  std::string out;
  if (!pending_.empty()) out = kReplacement;  // push leaves at most one unfinished character
  pending_.clear();
  return out;
}

}  // namespace gdn
