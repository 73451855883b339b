// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/file.h"

namespace gdn {
namespace {

constexpr const char* kFileName = "tokenizer.json";
constexpr const char* kFormat = "gdn-tokenizer";
constexpr int kVersion = 1;
constexpr const char* kUnknown = "<unk>";
constexpr const char* kEndOfText = "<eos>";

void save_json(const std::string& folder, nlohmann::json json) {
  json["format"] = kFormat;
  json["version"] = kVersion;
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  GDN_CHECK(!error, "[tokenizer] cannot make the folder ", folder, ": ", error.message());
  atomic_write_file(folder + "/" + kFileName, json.dump(1) + "\n");
}

class ByteTokenizer final : public Tokenizer {
 public:
  std::string type() const override { return "byte"; }
  int64_t vocab_size() const override { return 256; }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids(text.size());
    std::transform(text.begin(), text.end(), ids.begin(),
                   [](char c) { return static_cast<int32_t>(static_cast<uint8_t>(c)); });
    return ids;
  }

  std::string token_bytes(int32_t id) const override {
    GDN_CHECK(id >= 0 && id < 256, "[byte tokenizer] ids are 0..255, got ", id);
    return std::string(1, static_cast<char>(id));
  }

  void save(const std::string& folder) const override { save_json(folder, {{"type", "byte"}}); }
};

// Letters, digits, combining marks and what joins them into one word.
bool is_word_character(char32_t c) {
  if (c == U'_' || c == U'\'' || c == U'\u2019') return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return true;
    default:
      return false;
  }
}

bool is_white_space(char32_t c) { return c == U' ' || (c >= U'\t' && c <= U'\r'); }

class WordTokenizer final : public Tokenizer {
 public:
  explicit WordTokenizer(std::vector<std::string> words) : words_(std::move(words)) {
    GDN_CHECK(!words_.empty(), "[word tokenizer] the list of words is empty");
    for (size_t i = 0; i < words_.size(); ++i) {
      const auto [place, inserted] = ids_.emplace(words_[i], static_cast<int32_t>(i));
      GDN_CHECK(inserted, "[word tokenizer] words must differ, \"", words_[i], "\" is at ",
                place->second, " and at ", i);
    }
    unknown_ = find(kUnknown);
    eos_ = find(kEndOfText);
  }

  std::string type() const override { return "word"; }
  int64_t vocab_size() const override { return static_cast<int64_t>(words_.size()); }
  int32_t eos_id() const override { return eos_; }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    for (const std::string_view piece : split_words(text)) ids.push_back(lookup(piece));
    return ids;
  }

  std::string token_bytes(int32_t id) const override {
    GDN_CHECK(id >= 0 && id < vocab_size(), "[word tokenizer] ids are 0..", vocab_size() - 1,
              ", got ", id);
    return id == eos_ ? std::string() : words_[id];
  }

  void save(const std::string& folder) const override {
    save_json(folder, {{"type", "word"}, {"words", words_}});
  }

 private:
  int32_t find(const std::string& word) const {
    const auto place = ids_.find(word);
    return place == ids_.end() ? -1 : place->second;
  }

  int32_t lookup(std::string_view piece) const {
    std::string word(piece);
    int32_t id = find(word);
    if (id < 0) id = find(word.starts_with(' ') ? word.substr(1) : " " + word);
    if (id < 0) id = unknown_;
    GDN_CHECK(id >= 0, "[word tokenizer] \"", word, "\" is not among the ", words_.size(),
              " words and the vocabulary has no <unk>");
    return id;
  }

  std::vector<std::string> words_;
  std::unordered_map<std::string, int32_t> ids_;
  int32_t unknown_ = -1, eos_ = -1;
};

}  // namespace

std::vector<std::string_view> split_words(std::string_view text) {
  std::vector<std::string_view> pieces;
  size_t i = 0;
  while (i < text.size()) {
    const size_t begin = i;
    Utf8Char c = read_utf8(text, i);
    if (c.code_point == U' ' &&
        i + 1 < text.size()) {  // belongs to what follows unless that is white space
      const Utf8Char next = read_utf8(text, i + 1);
      if (!is_white_space(next.code_point)) {
        ++i;
        c = next;
      }
    }
    i += c.length;
    if (is_word_character(c.code_point)) {
      while (i < text.size()) {
        c = read_utf8(text, i);
        if (!is_word_character(c.code_point)) break;
        i += c.length;
      }
    }
    pieces.push_back(text.substr(begin, i - begin));
  }
  return pieces;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) text += token_bytes(id);
  return text;
}

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }

std::unique_ptr<Tokenizer> make_word_tokenizer(std::vector<std::string> words) {
  return std::make_unique<WordTokenizer>(std::move(words));
}

std::unique_ptr<Tokenizer> train_word_tokenizer(std::string_view text, int64_t max_words) {
  GDN_CHECK(max_words >= 1, "[word tokenizer] max_words must be at least 1, got ", max_words);
  std::unordered_map<std::string_view, int64_t> counts;
  for (const std::string_view piece : split_words(text)) ++counts[piece];
  std::vector<std::pair<std::string_view, int64_t>> order(counts.begin(), counts.end());
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });
  std::vector<std::string> words = {kUnknown, kEndOfText};
  for (const auto& [word, count] : order) {
    if (static_cast<int64_t>(words.size()) == max_words + 2) break;
    words.emplace_back(word);
  }
  return make_word_tokenizer(std::move(words));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder) {
  const std::string path = folder + "/" + kFileName;
  const nlohmann::json json =
      nlohmann::json::parse(read_text_file(path), nullptr, /*allow_exceptions=*/false);
  GDN_CHECK(json.is_object() && json.value("format", nlohmann::json()) == kFormat, "[tokenizer] ",
            path, " is not a tokenizer file of this program");
  GDN_CHECK(json.value("version", nlohmann::json()) == kVersion, "[tokenizer] ", path,
            " has version ", json.value("version", nlohmann::json()).dump(),
            ", this program reads version ", kVersion);
  const nlohmann::json type = json.value("type", nlohmann::json());
  if (type == "byte") return make_byte_tokenizer();
  GDN_CHECK(type == "word", "[tokenizer] ", path, " has type ", type.dump(),
            ", known are \"byte\" and \"word\"");
  const nlohmann::json words = json.value("words", nlohmann::json());
  GDN_CHECK(words.is_array() && std::all_of(words.begin(), words.end(),
                                            [](const auto& w) { return w.is_string(); }),
            "[tokenizer] ", path, " must hold \"words\", a list of strings");
  return make_word_tokenizer(words.get<std::vector<std::string>>());
}

}  // namespace gdn
