// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <string>

#include "gdn/base/check.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "gdn_file_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  size_t num_files() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  std::string folder_;
};

TEST_F(FileTest, WritesReadsAndMaps) {
  std::string big;
  for (int i = 0; i < 50000; ++i) big += std::to_string(i) + "\n";
  atomic_write_file(path("a"), [&](FileWriter& out) {
    out.write("head\n");
    out.write(big);
    EXPECT_EQ(out.position(), static_cast<int64_t>(big.size()) + 5);
    out.write("tail");
  });
  const std::string expected = "head\n" + big + "tail";
  EXPECT_EQ(read_text_file(path("a")), expected);
  MappedFile mapped(path("a"));
  EXPECT_EQ(mapped.text(), expected);
  MappedFile moved = std::move(mapped);
  EXPECT_EQ(moved.text(), expected);
  EXPECT_EQ(mapped.size(), 0u);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(FileTest, EmptyFile) {
  atomic_write_file(path("empty"), "");
  EXPECT_EQ(read_text_file(path("empty")), "");
  EXPECT_EQ(MappedFile(path("empty")).size(), 0u);
}

TEST_F(FileTest, FailureInTheMiddleLeavesTheOldFileAndNoTemporary) {
  atomic_write_file(path("a"), "old");
  EXPECT_THROW(atomic_write_file(path("a"),
                                 [](FileWriter& out) {
                                   out.write(std::string(1 << 20, 'x'));
                                   throw Error("stopped");
                                 }),
               Error);
  EXPECT_EQ(read_text_file(path("a")), "old");
  EXPECT_EQ(num_files(), 1u);
}

// A file-size limit makes write() fail in the middle as a full disk does.
TEST_F(FileTest, NoRoomIsOneClearErrorAndLeavesTheOldFile) {
  atomic_write_file(path("a"), "old");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 100000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string message;
  try {
    atomic_write_file(path("a"), std::string(1 << 20, 'x'));
  } catch (const Error& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(message, ::testing::StartsWith("[write] " + path("a") + ": "));
  EXPECT_EQ(read_text_file(path("a")), "old");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(FileTest, ErrorsNameThePath) {
  EXPECT_THAT(
      [&] { read_text_file(path("none")); },
      ::testing::ThrowsMessage<Error>(::testing::HasSubstr(path("none") + ": No such file")));
  EXPECT_THAT(
      [&] { MappedFile file(path("none")); },
      ::testing::ThrowsMessage<Error>(::testing::HasSubstr(path("none") + ": No such file")));
  EXPECT_THAT([&] { MappedFile file(folder_); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("not a regular file")));
  EXPECT_THAT([&] { read_text_file(folder_); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("is a folder")));
  EXPECT_THAT([&] { atomic_write_file(path("no/such/folder"), "x"); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("cannot create")));
}

}  // namespace
}  // namespace gdn
