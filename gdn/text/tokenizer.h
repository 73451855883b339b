// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/text/utf8.h"  // Utf8Stream, find_invalid_utf8: whoever decodes tokens needs them

namespace gdn {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string type() const = 0;  // "byte", "word"
  virtual int64_t vocab_size() const = 0;
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;
  // The bytes of one token; the text of a sequence is their concatenation (a token may hold part of
  // a character).
  virtual std::string token_bytes(int32_t id) const = 0;
  virtual int32_t eos_id() const { return -1; }  // -1: none

  std::string decode(std::span<const int32_t> ids) const;

  // Writes tokenizer.json (this project's own small format for byte and word) into a folder;
  // load_tokenizer reads it.
  virtual void save(const std::string& folder) const = 0;
};

// Ids 0..255 are bytes; any text round-trips. vocab_size 256.
std::unique_ptr<Tokenizer> make_byte_tokenizer();

// Words and punctuation marks (a leading space belongs to the word), from a list of strings: id =
// place in the list;
// "<unk>" must be in it for encode to accept unknown words, "<eos>" gives eos_id (its token_bytes
// are empty). A word that is listed only with its leading space, or only without, stands for both,
// so that a prompt may begin anywhere.
std::unique_ptr<Tokenizer> make_word_tokenizer(std::vector<std::string> words);

// The most frequent words of a text, at most max_words, plus "<unk>" and "<eos>".
std::unique_ptr<Tokenizer> train_word_tokenizer(std::string_view text, int64_t max_words);

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder);

// The pieces a word tokenizer sees: an optional space and a run of letters, digits, marks, '_' and
// '\'' or one other character; white space by itself otherwise. Their concatenation is the text.
// For UTF-8 text.
std::vector<std::string_view> split_words(std::string_view text);

}  // namespace gdn
