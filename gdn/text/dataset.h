// SPDX-License-Identifier: Apache-2.0
// Where training and validation batches come from. Batch i is a function of (seed, i), so a run
// resumes by remembering one number.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gdn/text/tokenizer.h"

namespace gdn {

// Token ids and the targets they predict (already shifted by one; -100: not scored), row-major
// [B,T]. With cu_seqlens the rows are one packed row: B == 1, sequences cut at cu_seqlens [N+1].
struct Batch {
  int64_t B = 0, T = 0;
  std::vector<int64_t> ids, targets;
  std::vector<int64_t> cu_seqlens;  // empty: B sequences of length T

  // Where sources ask questions: 1 at targets that are answers (all of them scored), else 0;
  // row-major [B,T]. The share of them that a model predicts is its recall. Empty: no questions.
  std::vector<uint8_t> answers;

  // Targets that are scored. Means over several batches (validation, accumulation) weight each
  // batch by it.
  int64_t num_scored() const;
};

class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual Batch train_batch(int64_t index) const = 0;
  // Validation is a fixed set in fixed order; num_val_batches() of them cover it once. The last
  // batch may be smaller.
  virtual int64_t num_val_batches() const = 0;
  virtual Batch val_batch(int64_t index) const = 0;
  virtual std::string describe() const = 0;  // one line for the log
};

struct TextDataOptions {
  std::string path;       // UTF-8 text file
  std::string cache_dir;  // where token shards are kept ("": default_cache_dir() of shard.h)
  std::string tokenizer = "byte";  // byte | word
  int64_t max_words = 8192;        // word tokenizer
  double val_fraction = 0.1;       // the last part of the text; 0: no validation
  int64_t batch_size = 32;         // B
  int64_t seq_len = 256;           // T
  uint64_t seed = 1337;
  bool pack_documents = false;  // cut at blank-line-separated documents and pack with cu_seqlens
};

// Windows of a memory-mapped token shard. Each epoch covers the training part once in shuffled
// order with a random offset (up to two windows at its ends are left out). Validation windows
// follow each other through the whole validation part; the last one may be padded with targets
// -100. With pack_documents a batch is one row of at most batch_size * seq_len tokens made of whole
// documents, longer ones cut into sequences of at most seq_len. Throws gdn::Error for a missing,
// empty or non-UTF-8 text and for one shorter than a sequence.
std::unique_ptr<BatchSource> make_text_source(const TextDataOptions& options);

struct StoryDataOptions {
  int64_t batch_size = 32;
  int64_t seq_len = 128;
  uint64_t seed = 1337;
  int64_t val_stories = 512;      // held out: no training story equals one of them
  double text_fraction = 0.0625;  // of the tokens that are not answers, how many are scored
};

// The generated corpus of the demo (stories.h). A training batch is batch_size rows of seq_len
// tokens in packed form; a row is one story, or two or four shorter ones, from which the model
// learns what a fact is before it can keep one for long. Validation has one story of up to seq_len
// tokens in each of its rows.
std::unique_ptr<BatchSource> make_story_source(const StoryDataOptions& options);

}  // namespace gdn
