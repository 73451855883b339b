// SPDX-License-Identifier: Apache-2.0
#include "gdn/text/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <set>

#include "gdn/base/check.h"
#include "gdn/base/rng.h"
#include "gdn/text/shard.h"
#include "gdn/text/shuffle.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class DatasetTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("gdn-dataset-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& content) {
    std::ofstream(folder_ / name, std::ios::binary) << content;
    return folder_ / name;
  }
  static std::string read(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  TextDataOptions options(const std::string& path) {
    TextDataOptions o;
    o.path = path;
    o.cache_dir = folder_ / "cache";
    o.batch_size = 3;
    o.seq_len = 8;
    return o;
  }
  template <typename Fn>
  static std::string error_of(Fn&& fn) {
    try {
      fn();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  std::string source_error(const TextDataOptions& o) {
    return error_of([&] { make_text_source(o); });
  }
  fs::path shard_file() {
    for (const auto& entry : fs::recursive_directory_iterator(folder_ / "cache")) {
      if (entry.path().filename() == "tokens.bin") return entry.path();
    }
    return {};
  }
  // Text in which every position can be told from the bytes around it.
  static std::string numbered(int64_t bytes) {
    std::string text;
    for (int i = 0; static_cast<int64_t>(text.size()) < bytes; ++i)
      text += std::to_string(i) + (i % 7 ? " " : "\n");
    text.resize(bytes);
    return text;
  }

  fs::path folder_;
};

TEST(Permutation, ReachesEveryPlaceOnceAndDependsOnSeedAndStream) {
  for (const uint64_t n : {1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097}) {
    const Permutation order(n, 3, 0);
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < n; ++i) seen.insert(order[i]);
    EXPECT_EQ(seen.size(), n);
    EXPECT_LT(*seen.rbegin(), n);
  }
  const auto first = [](uint64_t seed, uint64_t stream) {
    const Permutation order(1000, seed, stream);
    std::vector<uint64_t> out;
    for (uint64_t i = 0; i < 1000; ++i) out.push_back(order[i]);
    return out;
  };
  EXPECT_EQ(first(1, 0), first(1, 0));
  EXPECT_NE(first(1, 0), first(1, 1));
  EXPECT_NE(first(1, 0), first(2, 0));
  const std::vector<uint64_t> order = first(1, 0);
  int64_t fixed = 0, neighbours = 0;
  for (size_t i = 0; i + 1 < order.size(); ++i) {
    fixed += order[i] == i;
    neighbours += order[i + 1] == order[i] + 1;
  }
  EXPECT_LT(fixed, 20);  // a random order has one of each on average
  EXPECT_LT(neighbours, 20);
}

TEST_F(DatasetTest, ShardsHoldTheirTokensInTwoOrFourBytes) {
  for (const int64_t vocab : {300, 65536, 65537, 1000000}) {
    Rng rng(vocab);
    std::vector<int32_t> ids(10001);
    for (int32_t& id : ids) id = static_cast<int32_t>(rng.below(vocab));
    ids[5] = static_cast<int32_t>(vocab - 1);
    const std::string path = folder_ / "tokens.bin";
    TokenShard::write(path, vocab, [&](const TokenShard::Sink& sink) {
      const std::span<const int32_t> all(ids);
      sink(all.first(7));  // pieces that end inside the checksum's words
      sink(all.subspan(7, 4100));
      sink(all.subspan(4107));
    });
    EXPECT_EQ(fs::file_size(path), 64 + ids.size() * (vocab <= 65536 ? 2 : 4));
    const TokenShard shard(path);
    ASSERT_EQ(shard.size(), 10001);
    EXPECT_EQ(shard.vocab_size(), vocab);
    for (size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(shard[i], ids[i]);
  }
}

TEST_F(DatasetTest, EveryDamagedByteOfAShardIsNoticed) {
  const std::string path = folder_ / "tokens.bin";
  const std::vector<int32_t> ids = {1, 2, 3, 299, 5, 6, 7};
  TokenShard::write(path, 300, [&](const TokenShard::Sink& sink) { sink(ids); });
  const std::string good = read(path);
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x10);
    write("tokens.bin", bad);
    EXPECT_THROW(TokenShard{path}, Error) << "byte " << i;
  }
  for (const size_t length :
       {size_t{0}, size_t{10}, size_t{63}, size_t{64}, good.size() - 2, good.size() - 1}) {
    write("tokens.bin", good.substr(0, length));
    EXPECT_THAT(error_of([&] { TokenShard{path}; }), HasSubstr(path)) << length;
  }
  write("tokens.bin", good + "xx");
  EXPECT_THROW(TokenShard{path}, Error);
}

TEST_F(DatasetTest, HashesDifferForDifferentBytes) {
  std::set<uint64_t> seen;
  std::string text(200, '\0');
  seen.insert(hash_bytes(text));
  for (size_t i = 0; i < text.size(); ++i) {
    std::string other = text;
    other[i] = 1;
    seen.insert(hash_bytes(other));
    seen.insert(hash_bytes(text.substr(0, i)));
  }
  EXPECT_EQ(seen.size(), 401u);
  EXPECT_NE(hash_bytes("abc", 0), hash_bytes("abc", 1));
}

TEST_F(DatasetTest, ShardIsBuiltOnceAndAgainWhenTextOrTokenizerChangeOrItIsDamaged) {
  const std::string path = write("a.txt", numbered(5000));
  auto o = options(path);
  const std::vector<int64_t> expected = make_text_source(o)->train_batch(0).ids;
  const fs::path shard = shard_file();
  const auto written = fs::last_write_time(shard);
  fs::last_write_time(shard, written - std::chrono::hours(1));
  make_text_source(o);
  EXPECT_EQ(fs::last_write_time(shard), written - std::chrono::hours(1)) << "was written again";

  std::string damaged = read(shard);
  damaged[damaged.size() / 2] ^= 1;
  std::ofstream(shard, std::ios::binary) << damaged;
  EXPECT_EQ(make_text_source(o)->train_batch(0).ids, expected);
  EXPECT_NE(read(shard), damaged);

  o.tokenizer = "word";
  EXPECT_EQ(make_text_source(o)->tokenizer().type(), "word");
  o.tokenizer = "byte";
  write("a.txt", numbered(5000) + "more");
  EXPECT_THAT(make_text_source(o)->describe(), HasSubstr("5004 byte tokens"));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_ / "cache"), fs::directory_iterator{}), 3);
}

TEST_F(DatasetTest, WindowsAreTheTextAndTargetsAreTheNextToken) {
  const std::string text = numbered(1000);
  auto o = options(write("a.txt", text));
  const auto source = make_text_source(o);
  for (int64_t index : {0, 1, 57, 100000}) {
    const Batch batch = source->train_batch(index);
    ASSERT_EQ(batch.B, 3);
    ASSERT_EQ(batch.T, 8);
    ASSERT_EQ(batch.ids.size(), 24u);
    EXPECT_EQ(batch.num_scored(), 24);
    EXPECT_TRUE(batch.cu_seqlens.empty());
    for (int64_t row = 0; row < 3; ++row) {
      std::string window;
      for (int64_t t = 0; t < 8; ++t) window += static_cast<char>(batch.ids[row * 8 + t]);
      window += static_cast<char>(batch.targets[row * 8 + 7]);
      EXPECT_NE(text.substr(0, 900).find(window), std::string::npos) << "from the training part";
      for (int64_t t = 0; t < 7; ++t)
        EXPECT_EQ(batch.targets[row * 8 + t], batch.ids[row * 8 + t + 1]);
    }
  }
}

TEST_F(DatasetTest, BatchesAreAFunctionOfSeedAndIndex) {
  auto o = options(write("a.txt", numbered(2000)));
  const auto one = make_text_source(o), two = make_text_source(o);
  for (int64_t index : {31, 2, 31, 500})
    EXPECT_EQ(one->train_batch(index).ids, two->train_batch(index).ids);
  EXPECT_NE(one->train_batch(0).ids, one->train_batch(1).ids);
  o.seed = 2;
  EXPECT_NE(make_text_source(o)->train_batch(0).ids, one->train_batch(0).ids);
  EXPECT_EQ(make_text_source(o)->val_batch(0).ids, one->val_batch(0).ids)
      << "validation does not depend on the seed";
}

TEST_F(DatasetTest, AnEpochCoversEveryWindowOnce) {
  // 5 bytes per number, so that a window of 10 tells its own place.
  std::string text;
  for (int i = 10000; i < 10400; ++i) text += std::to_string(i);
  auto o = options(write("a.txt", text));
  o.seq_len = 10;
  o.batch_size = 1;
  const auto source = make_text_source(o);
  const int64_t train = static_cast<int64_t>(text.size()) - 200, windows = (train - 10) / 10;
  std::set<size_t> offsets;
  std::vector<size_t> orders[3];
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::set<size_t> places;
    for (int64_t i = 0; i < windows; ++i) {
      const Batch batch = source->train_batch(epoch * windows + i);
      const std::string window(batch.ids.begin(), batch.ids.end());
      const size_t place = text.find(window);
      ASSERT_NE(place, std::string::npos);
      ASSERT_LE(place + 11, static_cast<size_t>(train));
      places.insert(place);
      orders[epoch].push_back(place / 10);
    }
    ASSERT_EQ(static_cast<int64_t>(places.size()), windows) << "a window came twice";
    EXPECT_EQ(*places.rbegin() - *places.begin(), static_cast<size_t>(windows - 1) * 10)
        << "windows follow each other";
    offsets.insert(*places.begin());
  }
  EXPECT_GT(offsets.size(), 1u) << "epochs cut the text at different places";
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_FALSE(std::is_sorted(orders[0].begin(), orders[0].end()));
}

TEST_F(DatasetTest, ValidationIsTheLastPartExactlyOnce) {
  const std::string text = numbered(1003);
  for (const int64_t batch_size : {1, 3, 4, 50}) {
    auto o = options(write("a.txt", text));
    o.batch_size = batch_size;
    const auto source = make_text_source(o);
    std::string seen, predicted;
    for (int64_t i = 0; i < source->num_val_batches(); ++i) {
      const Batch batch = source->val_batch(i);
      ASSERT_EQ(static_cast<int64_t>(batch.ids.size()), batch.B * batch.T);
      ASSERT_EQ(batch.targets.size(), batch.ids.size());
      for (size_t t = 0; t < batch.ids.size(); ++t) {
        if (batch.targets[t] == -100) continue;
        seen += static_cast<char>(batch.ids[t]);
        predicted += static_cast<char>(batch.targets[t]);
      }
    }
    EXPECT_EQ(seen, text.substr(903, 99));
    EXPECT_EQ(predicted, text.substr(904));
    EXPECT_THROW(source->val_batch(source->num_val_batches()), Error);
  }
}

TEST_F(DatasetTest, TheShortestTextThatFitsIsAcceptedAndOneLessIsNot) {
  auto o = options("");
  o.val_fraction = 0;
  o.path = write("short.txt", "12345678");
  EXPECT_THAT(source_error(o),
              AllOf(HasSubstr("8 training tokens"), HasSubstr("needs 9"), HasSubstr("at most 7")));
  o.path = write("fits.txt", "123456789");
  const auto source = make_text_source(o);
  const Batch batch = source->train_batch(4);
  EXPECT_EQ(std::string(batch.ids.begin(), batch.ids.begin() + 8), "12345678");
  EXPECT_EQ(source->num_val_batches(), 0);
  o.val_fraction = 0.1;
  o.path = write("val.txt", numbered(15));
  EXPECT_THAT(source_error(o), AllOf(HasSubstr("1 validation tokens"), HasSubstr("val_fraction")));
}

TEST_F(DatasetTest, BadFilesAreNamedWithTheCause) {
  EXPECT_THAT(source_error(options(folder_ / "absent.txt")),
              AllOf(HasSubstr("absent.txt"), HasSubstr("No such file")));
  EXPECT_THAT(source_error(options(write("empty.txt", ""))),
              AllOf(HasSubstr("empty.txt"), HasSubstr("is empty")));
  EXPECT_THAT(source_error(options(folder_)), HasSubstr("not a regular file"));
  EXPECT_THAT(source_error(options(write("latin.txt", numbered(500) + "caf\xE9" + numbered(500)))),
              AllOf(HasSubstr("not UTF-8"), HasSubstr("0xe9"), HasSubstr("offset 503"),
                    HasSubstr("iconv")));
  auto o = options(write("a.txt", numbered(500)));
  o.tokenizer = "bite";
  EXPECT_THROW(make_text_source(o), UsageError);
  EXPECT_THAT(source_error(o), HasSubstr("did you mean \"byte\""));
  for (const auto& change : std::vector<std::function<void(TextDataOptions&)>>{
           [](auto& x) { x.batch_size = 0; }, [](auto& x) { x.seq_len = 0; },
           [](auto& x) { x.val_fraction = 1; }, [](auto& x) { x.val_fraction = -0.1; },
           [](auto& x) { x.max_words = 0; }}) {
    auto bad = options(o.path);
    change(bad);
    EXPECT_THROW(make_text_source(bad), UsageError);
  }
}

TEST_F(DatasetTest, PackedRowsAreWholeDocumentsCutAtSequenceLength) {
  std::map<char, std::string> documents;
  std::string text;
  for (int i = 0; i < 26; ++i) {
    const char c = static_cast<char>('a' + i);
    std::string document(2 + (i * 5) % 17, c);
    document += i % 3 ? "\n\n" : "\n\n\n";
    documents[c] = document;
    text += document;
  }
  auto o = options(write("a.txt", text));
  o.pack_documents = true;
  o.val_fraction = 0;
  const auto source = make_text_source(o);
  for (const bool word : {false, true}) {
    o.tokenizer = word ? "word" : "byte";
    const auto packed = make_text_source(o);
    for (int64_t index = 0; index < 30; ++index) {
      const Batch batch = packed->train_batch(index);
      EXPECT_EQ(batch.B, 1);
      EXPECT_LE(batch.T, 24);
      ASSERT_EQ(batch.ids.size(), static_cast<size_t>(batch.T));
      ASSERT_EQ(batch.cu_seqlens.front(), 0);
      ASSERT_EQ(batch.cu_seqlens.back(), batch.T);
      for (size_t n = 0; n + 1 < batch.cu_seqlens.size(); ++n) {
        const int64_t begin = batch.cu_seqlens[n], end = batch.cu_seqlens[n + 1];
        ASSERT_LT(begin, end);
        ASSERT_LE(end - begin, 8);
        std::vector<int32_t> tokens(batch.ids.begin() + begin, batch.ids.begin() + end);
        tokens.push_back(static_cast<int32_t>(batch.targets[end - 1]));
        const std::string piece = packed->tokenizer().decode(tokens);
        const bool inside = std::any_of(
            documents.begin(), documents.end(),
            [&](const auto& document) { return document.second.find(piece) != std::string::npos; });
        EXPECT_TRUE(inside) << "crosses documents: " << piece;
        for (int64_t t = begin; t + 1 < end; ++t) EXPECT_EQ(batch.targets[t], batch.ids[t + 1]);
      }
    }
  }
  // One epoch predicts every byte that has a byte of its document before it, once.
  int64_t expected = 0;
  for (const auto& [c, document] : documents) expected += static_cast<int64_t>(document.size()) - 1;
  const int64_t rows = (expected + 23) / 24;
  for (int64_t epoch = 0; epoch < 2; ++epoch) {
    int64_t predicted = 0;
    std::map<int64_t, int64_t> letters;
    for (int64_t i = 0; i < rows; ++i) {
      const Batch batch = source->train_batch(epoch * rows + i);
      predicted += batch.num_scored();
      for (const int64_t id : batch.ids) ++letters[id];
    }
    EXPECT_EQ(predicted, expected);
    for (const auto& [c, document] : documents)
      EXPECT_EQ(letters[c], std::count(document.begin(), document.end(), c));
  }
}

TEST_F(DatasetTest, PackedValidationIsOrderedAndApartFromTraining) {
  std::string text;
  for (int i = 0; i < 100; ++i)
    text += "line " + std::to_string(i) + (i < 80 ? " train" : " val") + "\n\n";
  auto o = options(write("a.txt", text));
  o.pack_documents = true;
  o.seq_len = 40;
  o.val_fraction =
      static_cast<double>(text.size() - text.find("line 80")) / static_cast<double>(text.size());
  o.val_fraction = std::nextafter(o.val_fraction, 1.0);
  const auto source = make_text_source(o);
  std::string seen;
  for (int64_t i = 0; i < source->num_val_batches(); ++i) {
    const Batch batch = source->val_batch(i);
    seen.append(batch.ids.begin(), batch.ids.end());
  }
  EXPECT_EQ(seen.find("train"), std::string::npos);
  EXPECT_LT(seen.find("line 80"), seen.find("line 99"));
  for (int64_t i = 0; i < 60; ++i) {
    const Batch batch = source->train_batch(i);
    EXPECT_EQ(std::string(batch.ids.begin(), batch.ids.end()).find("val"), std::string::npos);
  }
}

}  // namespace
}  // namespace gdn
