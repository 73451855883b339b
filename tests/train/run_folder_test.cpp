// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/run_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/train/crc32c.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class RunFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "gdn_run_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string save(int64_t step, const std::string& content = "weights") {
    return write_checkpoint(folder_, step, {{"note", 1}}, [&](const std::string& folder) {
      std::ofstream(folder + "/model.bin") << content << step;
      std::ofstream(folder + "/empty");
    });
  }
  std::string verify_error(const std::string& path) {
    try {
      verify_checkpoint(path);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
  std::vector<std::string> entries() {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_))
      names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  std::string folder_;
};

TEST(Crc32c, KnownAnswers) {
  EXPECT_EQ(crc32c(""), 0u);
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);            // the check value of the CRC catalogue
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  const std::string text = "The quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut)
    EXPECT_EQ(crc32c(text.substr(cut), crc32c(text.substr(0, cut))), crc32c(text));
}

TEST_F(RunFolder, WritesListsAndPrunes) {
  EXPECT_FALSE(has_run(folder_));
  for (const int64_t step : {5, 1000000, 20}) save(step);
  EXPECT_TRUE(has_run(folder_));
  EXPECT_EQ(fs::read_symlink(folder_ + "/latest"), "step-000020");
  const auto list = list_checkpoints(folder_);
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].step, 1000000);
  EXPECT_EQ(list[2].path, folder_ + "/step-000005");
  const auto state = verify_checkpoint(list[1].path);
  EXPECT_EQ(state["step"], 20);
  EXPECT_EQ(state["note"], 1);
  fs::create_directory(folder_ + "/.saving-step-000030");
  prune_checkpoints(folder_, 0);
  EXPECT_EQ(list_checkpoints(folder_).size(), 3u);
  prune_checkpoints(folder_, 2);
  EXPECT_THAT(entries(), ::testing::ElementsAre("latest", "step-000020", "step-1000000"));
}

TEST_F(RunFolder, FindsDamage) {
  const std::string path = save(1, std::string(10000, 'x'));
  EXPECT_EQ(verify_error(path), "no error");
  {
    std::fstream file(path + "/model.bin", std::ios::in | std::ios::out);
    file.seekp(7777);
    file.put('y');
  }
  EXPECT_THAT(verify_error(path), HasSubstr("checksum differs"));
  fs::resize_file(path + "/model.bin", 9000);
  EXPECT_THAT(verify_error(path), HasSubstr("must have 10001 bytes, got 9000"));
  fs::remove(path + "/model.bin");
  EXPECT_THAT(verify_error(path), HasSubstr("model.bin"));
  for (const char* bad :
       {"", "{", "[]", "{}", "{\"step\": 1}", "{\"step\":\"x\",\"files\":{}}",
        "{\"step\":1,\"files\":{\"../x\":{}}}", "{\"step\":1,\"files\":{\"empty\":3}}"}) {
    std::ofstream(path + "/state.json") << bad;
    EXPECT_THAT(verify_error(path), HasSubstr("not the state of a checkpoint")) << bad;
  }
}

TEST_F(RunFolder, AFailedSaveLeavesTheLastOne) {
  save(1);
  try {
    write_checkpoint(folder_, 2, {}, [](const std::string& folder) {
      std::ofstream(folder + "/half") << "x";
      throw Error("no space left");
    });
    FAIL() << "must throw";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("no space left"));
    EXPECT_THAT(e.what(), HasSubstr("step-000001 is the newest whole one"));
  }
  EXPECT_THAT(entries(), ::testing::ElementsAre("latest", "step-000001"));
  EXPECT_EQ(fs::read_symlink(folder_ + "/latest"), "step-000001");
}

TEST_F(RunFolder, SavingAStepAgainReplacesIt) {
  save(3, "old");
  const std::string path = save(3, "new");
  EXPECT_EQ(read_text_file(path + "/model.bin"), "new3");
  EXPECT_EQ(verify_error(path), "no error");
}

// A limit on the size of files acts as a full disk does: the write in the middle of a save fails.
TEST_F(RunFolder, AFullDiskIsAClearError) {
  save(1);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{20000, 20000};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      write_checkpoint(folder_, 2, {}, [](const std::string& folder) {
        atomic_write_file(folder + "/model.bin", std::string(100000, 'x'));
      });
    } catch (const Error& e) {
      _exit(std::string(e.what()).find("step-000001 is the newest whole one") == std::string::npos
                ? 2
                : 7);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(verify_error(folder_ + "/latest"), "no error");
  EXPECT_THAT(entries(), ::testing::ElementsAre("latest", "step-000001"));
}

TEST_F(RunFolder, TheLockKeepsASecondRunOut) {
  {
    const RunLock lock(folder_ + "/a");
    try {
      const RunLock second(folder_ + "/a");
      FAIL() << "must throw";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(),
                  HasSubstr("is in use by another run (process " + std::to_string(getpid()) + ")"));
    }
    const RunLock other(folder_ + "/b");
  }
  const RunLock again(folder_ + "/a");
  std::ofstream(folder_ + "/file") << "x";
  EXPECT_THROW(RunLock(folder_ + "/file/run"), Error);
}

}  // namespace
}  // namespace gdn
