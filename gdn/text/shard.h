// SPDX-License-Identifier: Apache-2.0
// Token shards: a text's token ids in one file that is written once, checked when opened, and
// memory-mapped.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "gdn/base/file.h"
#include "gdn/text/tokenizer.h"

namespace gdn {

// 64-bit checksum and content hash: not cryptographic, the same on every machine.
uint64_t hash_bytes(std::string_view bytes, uint64_t seed = 0);

// File: 64 header bytes (little endian), then `count` ids of 2 bytes (vocabularies up to 65536) or
// 4 bytes.
class TokenShard {
 public:
  // Throws gdn::Error naming the file and what is wrong: magic, version, size, checksum, an id
  // outside the vocabulary.
  explicit TokenShard(const std::string& path);

  int64_t size() const { return count_; }
  int64_t vocab_size() const { return vocab_size_; }
  int32_t operator[](int64_t i) const { return wide_ ? at<uint32_t>(i) : at<uint16_t>(i); }

  // Writes `path` atomically. `tokens_of` calls its argument with consecutive pieces of the token
  // sequence.
  using Sink = std::function<void(std::span<const int32_t>)>;
  static void write(const std::string& path, int64_t vocab_size,
                    const std::function<void(const Sink&)>& tokens_of);

 private:
  template <typename Id>
  int32_t at(int64_t i) const {
    return static_cast<int32_t>(reinterpret_cast<const Id*>(file_.data() + kHeaderBytes)[i]);
  }

  static constexpr size_t kHeaderBytes = 64;
  MappedFile file_;
  int64_t count_ = 0, vocab_size_ = 0;
  bool wide_ = false;
};

// A text file's tokens and the tokenizer that made them.
struct TokenizedText {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<TokenShard> tokens;
};

// Opens the shard of the text file `path` in `cache_dir` (default_cache_dir() when empty), or
// builds it there: a folder named after the file, its content's hash and the tokenizer. A damaged
// shard is built again. Throws gdn::Error for a missing, empty or non-UTF-8 text, UsageError for an
// unknown tokenizer.
TokenizedText tokenize_file(const std::string& path, const std::string& cache_dir,
                            const std::string& tokenizer, int64_t max_words);

// $XDG_CACHE_HOME/gdn, or ~/.cache/gdn.
std::string default_cache_dir();

}  // namespace gdn
