// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
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

TEST_F(FileTest, KeepsThePermissionsOfWhatItReplaces) {
  atomic_write_file(path("a"), "old");
  for (const auto mode : {fs::perms{0600}, fs::perms{0640}, fs::perms{0755}}) {
    fs::permissions(path("a"), mode);
    atomic_write_file(path("a"), "new");
    EXPECT_EQ(fs::status(path("a")).permissions(), mode);
  }
}

TEST_F(FileTest, NamesMayBeAsLongAsTheFileSystemAllows) {
  const std::string name(255, 'n');
  check_writable(path(name));
  atomic_write_file(path(name), "text");
  EXPECT_EQ(read_text_file(path(name)), "text");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(FileTest, WhatAKilledProcessLeftIsNotInTheWay) {
  // The names that this process would take next.
  const std::string number = "a.tmp-" + std::to_string(::getpid()) + "-";
  for (int i = 0; i < 20; ++i) std::ofstream(path(number + std::to_string(i))) << "half";
  check_writable(path("a"));
  atomic_write_file(path("a"), "whole");
  EXPECT_EQ(read_text_file(path("a")), "whole");
  EXPECT_EQ(num_files(), 21u);
  EXPECT_EQ(read_text_file(path(number + "0")), "half");
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
}

// The same line from a check beforehand as from writing, and nothing is left in the folder.
TEST_F(FileTest, WhatCannotBeWrittenIsSaidBeforehand) {
  atomic_write_file(path("file"), "x");
  fs::create_symlink("none/x", path("dangling"));
  fs::create_symlink("loop", path("loop"));
  const std::pair<std::string, std::string> cases[] = {
      {path("no/such/x"), "[write] cannot write " + path("no/such/x") + ": the folder " +
                              path("no/such") + " does not exist"},
      {path("dangling"), "[write] cannot write " + path("dangling") + ": the folder " + folder_ +
                             "/none does not exist"},
      {folder_, "[write] " + folder_ + " is a folder, not a file"},
      {path("new/"), "[write] " + path("new/") + " is a folder, not a file"},
      {path("file/x"), "[write] cannot write " + path("file/x") + ": Not a directory"},
      {path("loop"),
       "[write] cannot write " + path("loop") + ": Too many levels of symbolic links"},
      {"", "[write] the name of the file is empty"},
      {"/dev/fd/999999",
       "[write] cannot write /dev/fd/999999: no file can be made in the folder "
       "/dev/fd: No such file or directory"},
  };
  const auto error_of = [](const std::function<void()>& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  for (const auto& [name, message] : cases) {
    const std::string& path = name;
    EXPECT_EQ(error_of([&] { check_writable(path); }), message);
    EXPECT_EQ(error_of([&] { atomic_write_file(path, "x"); }), message);
  }
  EXPECT_EQ(num_files(), 3u);
}

TEST_F(FileTest, CheckingLeavesNothingBehind) {
  check_writable(path("new"));
  EXPECT_EQ(num_files(), 0u);
  atomic_write_file(path("a"), "old");
  check_writable(path("a"));
  EXPECT_EQ(read_text_file(path("a")), "old");
  EXPECT_EQ(num_files(), 1u);
  check_writable("/dev/null");
}

TEST_F(FileTest, ReplacesWhatASymbolicLinkLeadsTo) {
  fs::create_directory(path("there"));
  atomic_write_file(path("there/a"), "old");
  fs::create_symlink("there/a", path("link"));
  fs::create_symlink(path("link"), path("again"));
  fs::create_symlink("there/b", path("dangling"));
  atomic_write_file(path("again"), "new");
  atomic_write_file(path("dangling"), "made");
  EXPECT_TRUE(fs::is_symlink(path("link")));
  EXPECT_TRUE(fs::is_symlink(path("again")));
  EXPECT_TRUE(fs::is_symlink(path("dangling")));
  EXPECT_EQ(read_text_file(path("there/a")), "new");
  EXPECT_EQ(read_text_file(path("there/b")), "made");
  EXPECT_EQ(num_files(), 4u);
}

TEST_F(FileTest, WritesIntoAFifo) {
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  check_writable(path("fifo"));  // does not wait for a reader
  const int reader = ::open(path("fifo").c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_GE(reader, 0);
  const std::string content(5000, 'x');
  atomic_write_file(path("fifo"), content);
  std::string read(2 * content.size(), '\0');
  read.resize(static_cast<size_t>(std::max<ssize_t>(0, ::read(reader, read.data(), read.size()))));
  ::close(reader);
  EXPECT_EQ(read, content);
  EXPECT_TRUE(fs::is_fifo(path("fifo")));
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(FileTest, WritesIntoADevice) {
  atomic_write_file("/dev/null", "x");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  EXPECT_THAT(
      [&] { atomic_write_file("/dev/full", std::string(100000, 'x')); },
      ::testing::ThrowsMessage<Error>(::testing::StartsWith("[write] /dev/full: No space")));
}

// As /dev/stdout is, whatever it was redirected to: goes on where its descriptor stands.
TEST_F(FileTest, WritesIntoWhatThisProcessHasOpen) {
  const int fd = ::open(path("out").c_str(), O_RDWR | O_CREAT, 0666);
  ASSERT_GE(fd, 0);
  const std::string name = "/dev/fd/" + std::to_string(fd);
  fs::create_symlink(name, path("link"));
  ASSERT_EQ(::write(fd, "one ", 4), 4);
  check_writable(name);
  atomic_write_file(name, "two ");
  atomic_write_file(path("link"), "three ");
  ASSERT_EQ(::write(fd, "four", 4), 4);
  EXPECT_EQ(read_text_file(path("out")), "one two three four");
  fs::remove(path("out"));
  check_writable(name);
  atomic_write_file(name, "five");
  EXPECT_EQ(::lseek(fd, 0, SEEK_CUR), 22);
  EXPECT_EQ(num_files(), 1u);
  ::close(fd);
}

}  // namespace
}  // namespace gdn
