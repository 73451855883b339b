// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "gdn/base/file.h"
#include "gdn/train/crc32c.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

TEST(Format, Numbers) {
  EXPECT_EQ(format_count(950), "950");
  EXPECT_EQ(format_count(999.7), "1.00k");
  EXPECT_EQ(format_count(12345), "12.3k");
  EXPECT_EQ(format_count(159e3), "159k");
  EXPECT_EQ(format_count(1.354e6), "1.35M");
  EXPECT_EQ(format_count(2.1e9), "2.10G");
  EXPECT_EQ(format_count(7e12), "7.00T");
  EXPECT_EQ(format_bytes(100), "100 B");
  EXPECT_EQ(format_bytes(2.3 * (1 << 30)), "2.3 GiB");
  EXPECT_EQ(format_bytes(300.0 * (1 << 20)), "300 MiB");
  EXPECT_EQ(format_seconds(42), "42s");
  EXPECT_EQ(format_seconds(33 * 60 - 5), "33m");
  EXPECT_EQ(format_seconds(2 * 3600 + 300), "2h05m");
  EXPECT_EQ(format_seconds(3 * 86400 + 4 * 3600), "3d04h");
}

TEST(Format, ProgressLine) {
  Metrics m{
      .step = 120, .loss = 3.21451, .lr = 6e-4, .grad_norm = 0.829, .tokens_per_second = 159e3};
  const Progress p{.max_iters = 5000,
                   .step_seconds = 0.412,
                   .mfu = 0.381,
                   .memory = static_cast<int64_t>(2.3 * (1 << 30)),
                   .eta_seconds = 33 * 60};
  EXPECT_EQ(progress_line(m, p),
            "step 120/5000 | loss 3.2145 | norm 0.83 | lr 6.0e-4 | 412 ms | 159k tok/s | mfu 38.1% "
            "| mem 2.3 GiB | "
            "eta 33m");
  m.val_loss = 3.1;
  EXPECT_EQ(validation_line(m, p), "step 120/5000 | val loss 3.1000");
}

class MetricsFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "gdn_metrics_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<json> rows() {
    std::vector<json> out;
    std::ifstream file(folder_ + "/metrics.jsonl");
    for (std::string line; std::getline(file, line);) out.push_back(json::parse(line));
    return out;
  }
  std::string folder_;
};

TEST_F(MetricsFiles, KeysThatWereNotMeasuredAreAbsent) {
  MetricsWriter writer(folder_, -1, false);
  writer.write({.step = 0, .val_loss = 5.5, .seconds = 1.25});
  writer.write({.step = 1,
                .loss = 5.4,
                .lr = 1e-3,
                .grad_norm = 2.0,
                .tokens_per_second = 10.0,
                .seconds = 2});
  EXPECT_EQ(rows()[0], (json{{"step", 0}, {"val_loss", 5.5}, {"seconds", 1.25}}));
  EXPECT_EQ(rows()[1], (json{{"step", 1},
                             {"loss", 5.4},
                             {"lr", 1e-3},
                             {"grad_norm", 2.0},
                             {"tokens_per_second", 10.0},
                             {"seconds", 2.0}}));
  EXPECT_FALSE(fs::exists(folder_ + "/tensorboard"));
}

TEST_F(MetricsFiles, ResumingDropsWhatWillBeWrittenAgain) {
  {
    MetricsWriter writer(folder_, -1, false);
    for (int64_t step : {0, 1, 2, 3, 4}) writer.write({.step = step, .loss = 1.0 + step});
  }
  std::ofstream(folder_ + "/metrics.jsonl", std::ios::app)
      << "{\"step\":5,\"lo";  // cut short by a crash
  MetricsWriter writer(folder_, 2, false);
  writer.write({.step = 3, .loss = 9.0});
  const auto r = rows();
  ASSERT_EQ(r.size(), 4u);
  EXPECT_EQ(r[2]["step"], 2);
  EXPECT_EQ(r[3]["loss"], 9.0);
}

// Reads the frames of an event file, checking lengths and checksums, and decodes the protocol
// buffers field by field.
struct DecodedEvent {
  double wall_time = 0;
  int64_t step = 0;
  std::string version, tag;
  float value = 0;
  int64_t session = 0;
};

uint64_t varint(const std::string& s, size_t& at) {
  uint64_t x = 0;
  for (int shift = 0;; shift += 7) {
    const uint8_t byte = static_cast<uint8_t>(s.at(at++));
    x |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return x;
  }
}

template <typename T>
T raw(const std::string& s, size_t at) {
  T x;
  EXPECT_LE(at + sizeof x, s.size());
  std::memcpy(&x, s.data() + at, sizeof x);
  return x;
}

void decode(const std::string& s,
            const std::function<void(uint64_t field, const std::string& bytes)>& f) {
  for (size_t at = 0; at < s.size();) {
    const uint64_t key = varint(s, at);
    size_t size = 0;
    const size_t begin = at;
    if ((key & 7) == 0) {
      varint(s, at);
      size = at - begin;
      at = begin;
    } else if ((key & 7) == 1) {
      size = 8;
    } else if ((key & 7) == 5) {
      size = 4;
    } else {
      size = varint(s, at);
    }
    f(key >> 3, s.substr(at, size));
    at += size;
  }
}

std::vector<DecodedEvent> read_events(const std::string& path) {
  const std::string s = read_text_file(path);
  const auto unmask = [](uint32_t crc) {
    const uint32_t rotated = crc - 0xa282ead8u;
    return rotated >> 17 | rotated << 15;
  };
  std::vector<DecodedEvent> out;
  for (size_t at = 0; at < s.size();) {
    const auto size = raw<uint64_t>(s, at);
    EXPECT_EQ(unmask(raw<uint32_t>(s, at + 8)), crc32c(std::string_view(s).substr(at, 8)));
    const std::string body = s.substr(at + 12, size);
    EXPECT_EQ(unmask(raw<uint32_t>(s, at + 12 + size)), crc32c(body));
    at += 16 + size;
    DecodedEvent e;
    decode(body, [&](uint64_t field, const std::string& bytes) {
      size_t zero = 0;
      if (field == 1) e.wall_time = raw<double>(bytes, 0);
      if (field == 2) e.step = static_cast<int64_t>(varint(bytes, zero));
      if (field == 3) e.version = bytes;
      if (field == 7)
        decode(bytes, [&](uint64_t, const std::string& b) {
          e.session = static_cast<int64_t>(varint(b, zero = 0));
        });
      if (field == 5)
        decode(bytes, [&](uint64_t, const std::string& value) {
          decode(value, [&](uint64_t f, const std::string& b) {
            if (f == 1) e.tag = b;
            if (f == 2) e.value = raw<float>(b, 0);
          });
        });
    });
    out.push_back(e);
  }
  return out;
}

TEST_F(MetricsFiles, EventFilesHoldTheScalars) {
  { MetricsWriter(folder_, -1, true).write({.step = 300, .loss = 2.5, .val_loss = 2.25}); }
  { MetricsWriter(folder_, 300, true).write({.step = 1000000, .lr = 0.5}); }
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder_ + "/tensorboard"))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  ASSERT_EQ(files.size(), 2u);
  const auto first = read_events(files[0]), second = read_events(files[1]);
  ASSERT_EQ(first.size(), 3u);
  EXPECT_EQ(first[0].version, "brain.Event:2");
  EXPECT_GT(first[0].wall_time, 1.7e9);
  EXPECT_EQ(first[1].tag, "train/loss");
  EXPECT_EQ(first[1].step, 300);
  EXPECT_EQ(first[1].value, 2.5f);
  EXPECT_EQ(first[2].tag, "val/loss");
  ASSERT_EQ(second.size(), 3u);
  EXPECT_EQ(second[1].session, 1);
  EXPECT_EQ(second[1].step, 301);
  EXPECT_EQ(second[2].step, 1000000);
  EXPECT_EQ(second[2].value, 0.5f);
}

}  // namespace
}  // namespace gdn
