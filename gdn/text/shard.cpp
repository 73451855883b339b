// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/shard.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iomanip>
#include <iterator>
#include <limits>
#include <sstream>
#include <system_error>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/names.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'G', 'D', 'N', 'T', 'O', 'K', 'N', 'S'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kNarrowVocab = 65536;
constexpr size_t kPieceBytes = size_t{8} << 20;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t bytes_per_token;
  uint64_t count;
  uint64_t vocab_size;
  uint64_t checksum;     // of the ids' bytes, seeded with vocab_size
  uint64_t reserved[3];  // 0
};
static_assert(sizeof(Header) == 64);

uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// A hash fed piece by piece. The pieces' cuts do not change it as long as all but the last are
// multiples of 8 bytes.
class Hasher {
 public:
  explicit Hasher(uint64_t seed) : state_(seed ^ 0x9e3779b97f4a7c15ull) {}

  void add(std::string_view bytes) {
    size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) add_word(bytes.data() + i, 8);
    if (i < bytes.size()) add_word(bytes.data() + i, bytes.size() - i);
    length_ += bytes.size();
  }

  uint64_t value() const { return mix(state_ ^ length_, 0x94d049bb133111ebull); }

 private:
  void add_word(const char* bytes, size_t n) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, n);
    // Adding before the fold keeps a zero product from absorbing what came before.
    state_ = mix(state_ ^ word, 0xbf58476d1ce4e5b9ull) + word;
  }

  uint64_t state_, length_ = 0;
};

template <typename Id>
std::string_view pack(std::span<const int32_t> ids, std::vector<Id>& buffer) {
  buffer.assign(ids.begin(), ids.end());
  return {reinterpret_cast<const char*>(buffer.data()), buffer.size() * sizeof(Id)};
}

template <typename Id>
uint64_t largest(const std::byte* data, uint64_t count) {
  const Id* ids = reinterpret_cast<const Id*>(data);
  return count == 0 ? 0 : *std::max_element(ids, ids + count);
}

// The text in pieces of about kPieceBytes that end with a line, so that no word is cut.
void for_each_piece(std::string_view text, const std::function<void(std::string_view)>& fn) {
  while (!text.empty()) {
    size_t end = text.size();
    if (end > kPieceBytes) {
      const size_t line = text.find('\n', kPieceBytes);
      if (line != std::string_view::npos) end = line + 1;
    }
    fn(text.substr(0, end));
    text.remove_prefix(end);
  }
}

std::string hex(uint64_t value) {
  std::ostringstream out;
  out << std::hex << std::setw(16) << std::setfill('0') << value;
  return out.str();
}

void check_text(const std::string& path, std::string_view text) {
  GDN_CHECK(!text.empty(), "[text] ", path, " is empty; give a UTF-8 text file");
  const size_t bad = find_invalid_utf8(text);
  GDN_CHECK(bad == std::string_view::npos, "[text] ", path, " is not UTF-8: byte 0x",
            hex(static_cast<uint8_t>(text[bad])).substr(14), " at offset ", bad,
            "; convert it, e.g. iconv -f latin1 -t utf-8");
}

TokenizedText open_cached(const std::string& folder) {
  TokenizedText text{load_tokenizer(folder), std::make_unique<TokenShard>(folder + "/tokens.bin")};
  GDN_CHECK(text.tokens->vocab_size() == text.tokenizer->vocab_size(), "[tokens] ", folder,
            " holds ids of ", text.tokens->vocab_size(), " words beside a tokenizer of ",
            text.tokenizer->vocab_size());
  return text;
}

}  // namespace

uint64_t hash_bytes(std::string_view bytes, uint64_t seed) {
  Hasher hasher(seed);
  hasher.add(bytes);
  return hasher.value();
}

TokenShard::TokenShard(const std::string& path) : file_(path) {
  GDN_CHECK(file_.size() >= kHeaderBytes, "[tokens] ", path, " is truncated: ", file_.size(),
            " bytes, the header alone has ", kHeaderBytes);
  Header header;
  std::memcpy(&header, file_.data(), sizeof(header));
  GDN_CHECK(std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0, "[tokens] ", path,
            " is not a token shard");
  GDN_CHECK(header.version == kVersion, "[tokens] ", path, " has version ", header.version,
            ", this program reads version ", kVersion);
  GDN_CHECK(header.vocab_size >= 1 && header.vocab_size <= std::numeric_limits<int32_t>::max() &&
                header.bytes_per_token == (header.vocab_size <= kNarrowVocab ? 2u : 4u),
            "[tokens] ", path, " says ", header.bytes_per_token, " bytes per token of ",
            header.vocab_size, " words");
  const uint64_t payload = file_.size() - kHeaderBytes;
  GDN_CHECK(
      payload % header.bytes_per_token == 0 && payload / header.bytes_per_token == header.count,
      "[tokens] ", path, " holds ", payload, " bytes of tokens, its header says ", header.count,
      " tokens of ", header.bytes_per_token);
  wide_ = header.bytes_per_token == 4;
  const std::byte* ids = file_.data() + kHeaderBytes;
  GDN_CHECK(hash_bytes(file_.text().substr(kHeaderBytes), header.vocab_size) == header.checksum &&
                std::all_of(std::begin(header.reserved), std::end(header.reserved),
                            [](uint64_t x) { return x == 0; }),
            "[tokens] ", path, " is damaged: its checksum does not fit");
  const uint64_t top =
      wide_ ? largest<uint32_t>(ids, header.count) : largest<uint16_t>(ids, header.count);
  GDN_CHECK(top < header.vocab_size, "[tokens] ", path, " holds the id ", top,
            " outside its vocabulary of ", header.vocab_size);
  count_ = static_cast<int64_t>(header.count);
  vocab_size_ = static_cast<int64_t>(header.vocab_size);
}

void TokenShard::write(const std::string& path, int64_t vocab_size,
                       const std::function<void(const Sink&)>& tokens_of) {
  const bool wide = vocab_size > kNarrowVocab;
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.bytes_per_token = wide ? 4 : 2;
  header.vocab_size = static_cast<uint64_t>(vocab_size);
  // The header comes first but knows the count and checksum, so the tokens are made twice: once to
  // measure them.
  std::vector<uint16_t> narrow_ids;
  std::vector<uint32_t> wide_ids;
  const auto bytes_of = [&](std::span<const int32_t> ids) {
    return wide ? pack(ids, wide_ids) : pack(ids, narrow_ids);
  };
  Hasher hasher(header.vocab_size);
  std::string rest;
  tokens_of([&](std::span<const int32_t> ids) {
    rest += bytes_of(ids);
    const size_t whole = rest.size() / 8 * 8;
    hasher.add(std::string_view(rest).substr(0, whole));
    rest.erase(0, whole);
    header.count += ids.size();
  });
  hasher.add(rest);
  header.checksum = hasher.value();
  atomic_write_file(path, [&](FileWriter& file) {
    file.write(&header, sizeof(header));
    tokens_of([&](std::span<const int32_t> ids) { file.write(bytes_of(ids)); });
  });
}

std::string default_cache_dir() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0') {
    return std::string(cache) + "/gdn";
  }
  const char* home = std::getenv("HOME");
  GDN_CHECK(home != nullptr && *home != '\0',
            "[text] no place for token shards: set a cache folder, or HOME");
  return std::string(home) + "/.cache/gdn";
}

TokenizedText tokenize_file(const std::string& path, const std::string& cache_dir,
                            const std::string& tokenizer, int64_t max_words) {
  if (tokenizer != "byte" && tokenizer != "word") {
    throw UsageError(str_cat("[text] tokenizer must be byte or word, got \"", tokenizer, "\"",
                             did_you_mean(tokenizer, {"byte", "word"})));
  }
  const MappedFile file(path);
  const std::string_view text = file.text();
  GDN_CHECK(!text.empty(), "[text] ", path, " is empty; give a UTF-8 text file");
  const std::string kind = tokenizer == "word" ? str_cat("word", max_words) : tokenizer;
  const std::string folder =
      str_cat(cache_dir.empty() ? default_cache_dir() : cache_dir, "/",
              fs::path(path).stem().string(), "-", kind, "-", hex(hash_bytes(text)));
  if (fs::exists(folder + "/tokens.bin")) {
    try {
      return open_cached(folder);
    } catch (const Error&) {
      // Damaged: the text is here, so it is built again.
    }
  }
  check_text(path, text);
  std::error_code error;
  fs::create_directories(folder, error);
  GDN_CHECK(!error, "[text] cannot make the cache folder ", folder, ": ", error.message());
  const auto made =
      tokenizer == "word" ? train_word_tokenizer(text, max_words) : make_byte_tokenizer();
  made->save(folder);
  TokenShard::write(folder + "/tokens.bin", made->vocab_size(), [&](const TokenShard::Sink& sink) {
    for_each_piece(text, [&](std::string_view piece) { sink(made->encode(piece)); });
  });
  return open_cached(folder);
}

}  // namespace gdn
