// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/dataset.h"

#include <algorithm>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/rng.h"
#include "gdn/text/shard.h"
#include "gdn/text/shuffle.h"

namespace gdn {
namespace {

// Streams of random numbers that must not repeat each other.
constexpr uint64_t kEpochStream = 1u << 20;
constexpr uint64_t kDocumentStream = 1u << 10;

void check_options(const TextDataOptions& o) {
  const auto require = [](bool ok, const auto&... message) {
    if (!ok) throw UsageError(str_cat("[text] ", message...));
  };
  require(o.batch_size >= 1, "batch_size must be at least 1, got ", o.batch_size);
  require(o.seq_len >= 1, "seq_len must be at least 1, got ", o.seq_len);
  require(o.val_fraction >= 0 && o.val_fraction < 1, "val_fraction must be in [0, 1), got ",
          o.val_fraction);
  require(o.max_words >= 1, "max_words must be at least 1, got ", o.max_words);
}

// What both ways of cutting a text share: the tokens and where the validation part begins.
class TextSource : public BatchSource {
 public:
  explicit TextSource(const TextDataOptions& options) : options_(options) {
    check_options(options);
    text_ = tokenize_file(options.path, options.cache_dir, options.tokenizer, options.max_words);
    const int64_t size = text_.tokens->size(), need = options.seq_len + 1;
    const int64_t val = static_cast<int64_t>(static_cast<double>(size) * options.val_fraction);
    val_begin_ = size - val;
    GDN_CHECK(val_begin_ >= need, "[text] ", options.path, " has ", val_begin_,
              " training tokens (of ", size, "), one sequence needs ", need,
              "; give a longer text or a seq_len of at most ",
              std::max<int64_t>(val_begin_ - 1, 1));
    GDN_CHECK(options.val_fraction == 0 || val >= 2, "[text] ", options.path, " has ", val,
              " validation tokens (of ", size,
              "), at least 2 are needed; give a longer text, a larger ",
              "val_fraction, or val_fraction 0");
  }

  const Tokenizer& tokenizer() const override { return *text_.tokenizer; }

 protected:
  std::string describe_text() const {
    return str_cat(options_.path, ": ", text_.tokens->size(), " ", tokenizer().type(),
                   " tokens of ", tokenizer().vocab_size(), " (", val_begin_, " training, ",
                   text_.tokens->size() - val_begin_, " validation)");
  }

  // Appends `count` ids from `begin` and the targets they predict.
  void append(Batch& batch, int64_t begin, int64_t count) const {
    const TokenShard& tokens = *text_.tokens;
    for (int64_t i = begin; i < begin + count; ++i) {
      batch.ids.push_back(tokens[i]);
      batch.targets.push_back(tokens[i + 1]);
    }
  }

  TextDataOptions options_;
  TokenizedText text_;
  int64_t val_begin_ = 0;
};

class WindowSource final : public TextSource {
 public:
  explicit WindowSource(const TextDataOptions& options) : TextSource(options) {
    // One window less than fit, where there are several: the offset then moves by a whole window.
    windows_ = std::max<int64_t>(1, (val_begin_ - options.seq_len) / options.seq_len);
    offsets_ =
        val_begin_ - windows_ * options.seq_len;  // how many places the first window may start at
    const int64_t predicted = text_.tokens->size() - val_begin_ - 1;
    val_windows_ = std::max<int64_t>(0, (predicted + options.seq_len - 1) / options.seq_len);
  }

  Batch train_batch(int64_t index) const override {
    Batch batch{.B = options_.batch_size,
                .T = options_.seq_len,
                .ids = {},
                .targets = {},
                .cu_seqlens = {},
                .answers = {}};
    for (int64_t row = 0; row < batch.B; ++row) {
      const int64_t drawn = index * batch.B + row, epoch = drawn / windows_;
      Rng rng(options_.seed, kEpochStream + epoch);
      const int64_t offset = static_cast<int64_t>(rng.below(offsets_));
      const Permutation order(windows_, options_.seed, 2 * kEpochStream + epoch);
      append(batch, offset + static_cast<int64_t>(order[drawn % windows_]) * batch.T, batch.T);
    }
    return batch;
  }

  int64_t num_val_batches() const override {
    return (val_windows_ + options_.batch_size - 1) / options_.batch_size;
  }

  Batch val_batch(int64_t index) const override {
    GDN_CHECK(index >= 0 && index < num_val_batches(), "[text] validation batch ", index, " of ",
              num_val_batches());
    const int64_t first = index * options_.batch_size, T = options_.seq_len;
    Batch batch{.B = std::min(options_.batch_size, val_windows_ - first),
                .T = T,
                .ids = {},
                .targets = {},
                .cu_seqlens = {},
                .answers = {}};
    for (int64_t row = 0; row < batch.B; ++row) {
      const int64_t begin = val_begin_ + (first + row) * T;
      append(batch, begin, std::min(T, text_.tokens->size() - 1 - begin));
      batch.ids.resize((row + 1) * T, 0);
      batch.targets.resize((row + 1) * T, -100);
    }
    return batch;
  }

  std::string describe() const override {
    return str_cat(describe_text(), ", ", windows_, " windows of ", options_.seq_len, " per epoch");
  }

 private:
  int64_t windows_ = 0, offsets_ = 0, val_windows_ = 0;
};

// Documents, separated by blank lines, as sequences of their own in rows of batch_size * seq_len
// tokens.
class PackedSource final : public TextSource {
 public:
  explicit PackedSource(const TextDataOptions& options) : TextSource(options) {
    const int32_t id = tokenizer().encode("\n")[0];
    if (tokenizer().token_bytes(id) == "\n")
      line_end_ = id;  // else the text has none: one document
    std::vector<Piece> train = pieces(0, val_begin_),
                       val = pieces(val_begin_, text_.tokens->size());
    GDN_CHECK(!train.empty() && (!val.empty() || options.val_fraction == 0), "[text] ",
              options.path, " has no document of two tokens in its ",
              train.empty() ? "training" : "validation",
              " part; give a longer text or pack_documents = false");
    const Permutation order(train.size(), options.seed, kDocumentStream);
    std::vector<Piece> shuffled(train.size());
    for (size_t i = 0; i < train.size(); ++i) shuffled[i] = train[order[i]];
    train_rows_ = rows(shuffled);
    val_rows_ = rows(val);
  }

  Batch train_batch(int64_t index) const override {
    const int64_t count = static_cast<int64_t>(train_rows_.size());
    const Permutation order(count, options_.seed, 2 * kEpochStream + index / count);
    return make(train_rows_[order[index % count]]);
  }

  int64_t num_val_batches() const override { return static_cast<int64_t>(val_rows_.size()); }

  Batch val_batch(int64_t index) const override {
    GDN_CHECK(index >= 0 && index < num_val_batches(), "[text] validation batch ", index, " of ",
              num_val_batches());
    return make(val_rows_[index]);
  }

  std::string describe() const override {
    return str_cat(describe_text(), ", documents packed into ", train_rows_.size(), " rows of ",
                   options_.batch_size * options_.seq_len, " per epoch");
  }

 private:
  struct Piece {
    int64_t begin, count;  // ids; one token more is read, as the last target
  };
  using Row = std::vector<Piece>;

  // The documents of a part of the text, in order, each cut into pieces of at most seq_len.
  std::vector<Piece> pieces(int64_t begin, int64_t end) const {
    std::vector<Piece> out;
    int64_t document = begin;
    for (int64_t i = begin; i < end; ++i) {
      // A blank line ends a document; the line ends that follow it belong to it.
      const bool ends = i + 1 == end || (i > document && is_line_end(i - 1) && is_line_end(i) &&
                                         !is_line_end(i + 1));
      if (!ends) continue;
      for (int64_t p = document; p < i; p += options_.seq_len)
        out.push_back({p, std::min(options_.seq_len, i - p)});
      document = i + 1;
    }
    return out;
  }

  bool is_line_end(int64_t i) const { return (*text_.tokens)[i] == line_end_; }

  // Fills rows in the given order; a piece that does not fit is cut, and its rest begins the next
  // row.
  std::vector<Row> rows(const std::vector<Piece>& pieces) const {
    const int64_t room = options_.batch_size * options_.seq_len;
    std::vector<Row> out;
    int64_t used = room;
    for (Piece piece : pieces) {
      while (piece.count > 0) {
        if (used == room) {
          out.emplace_back();
          used = 0;
        }
        const int64_t count = std::min(piece.count, room - used);
        out.back().push_back({piece.begin, count});
        used += count;
        piece = {piece.begin + count, piece.count - count};
      }
    }
    return out;
  }

  Batch make(const Row& row) const {
    Batch batch{.B = 1, .T = 0, .ids = {}, .targets = {}, .cu_seqlens = {0}, .answers = {}};
    for (const Piece& piece : row) {
      append(batch, piece.begin, piece.count);
      batch.T += piece.count;
      batch.cu_seqlens.push_back(batch.T);
    }
    return batch;
  }

  int32_t line_end_ = -1;
  std::vector<Row> train_rows_, val_rows_;
};

}  // namespace

int64_t Batch::num_scored() const {
  return std::count_if(targets.begin(), targets.end(),
                       [](int64_t target) { return target != -100; });
}

std::unique_ptr<BatchSource> make_text_source(const TextDataOptions& options) {
  if (options.pack_documents) return std::make_unique<PackedSource>(options);
  return std::make_unique<WindowSource>(options);
}

}  // namespace gdn
