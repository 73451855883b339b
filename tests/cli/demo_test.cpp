// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gdn/cli/cli.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

constexpr const char* kTiny = R"(
[model]
hidden_size = 16
num_layers = 1
intermediate_size = 16
[model.mixer]
name = "gated_delta_net"
num_heads = 1
head_dim = 8
expand_v = 1.0
[data]
kind = "stories"
seq_len = 64
batch_size = 4
val_stories = 8
[train]
max_iters = 4
warmup_iters = 1
log_interval = 1
)";

class Demo : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("gdn-demo-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
    return folder_ / name;
  }

  int call(std::vector<std::string> args) {
    args.insert(args.begin(), "gdn");
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    const int status = run_main(static_cast<int>(argv.size()), argv.data());
    out_ = ::testing::internal::GetCapturedStdout();
    err_ = ::testing::internal::GetCapturedStderr();
    return status;
  }

  fs::path folder_;
  std::string out_, err_;
};

// The learning itself is the demo's business; here a few steps must leave the whole report.
TEST_F(Demo, ReportsBothModelsAndCanBeRunAgain) {
  const std::string config = write("tiny.toml", kTiny);
  nlohmann::json summary;
  for (int round = 0; round < 2; ++round) {
    ASSERT_EQ(call({"demo", "--config", config, "--out-dir", folder_ / "runs", "--stories", "30"}),
              0)
        << err_;
    EXPECT_THAT(out_, HasSubstr("erase off"));
    EXPECT_THAT(out_, HasSubstr("Where is <person>?"));
    EXPECT_THAT(out_, HasSubstr(" reached the"));
    EXPECT_THAT(out_, HasSubstr("makes up after"));
    EXPECT_THAT(err_, HasSubstr("step 4/4"));
    std::ifstream file(folder_ / "runs" / "summary.json");
    summary = nlohmann::json::parse(file);
    EXPECT_EQ(summary["steps"], 4);
    EXPECT_EQ(summary["steps_erase_off"], 4);
    EXPECT_EQ(summary["seed"], 1337);
    EXPECT_GT(summary["questions"].get<int>(), 80);  // three in each story, rarely less
    for (const char* share : {"recall", "recall_chance", "recall_erase_off"}) {
      EXPECT_GE(summary[share].get<double>(), 0.0) << share;
      EXPECT_LE(summary[share].get<double>(), 1.0) << share;
    }
    EXPECT_GT(summary["recall_chance"].get<double>(), 0.1);
    for (const char* positive : {"train_seconds", "val_loss", "parameters"}) {
      EXPECT_GT(summary[positive].get<double>(), 0.0) << positive;
    }
  }
  // Models of equal size: the only difference is one option.
  std::ifstream with(folder_ / "runs" / "model" / "config.toml"),
      without(folder_ / "runs" / "erase-off" / "config.toml");
  std::string a((std::istreambuf_iterator<char>(with)), {}),
      b((std::istreambuf_iterator<char>(without)), {});
  EXPECT_EQ(a.find("erase = false"), std::string::npos);
  EXPECT_NE(b.find("erase = false"), std::string::npos);
}

TEST_F(Demo, RecallOfACheckpointIsWhatTheDemoReports) {
  const std::string config = write("tiny.toml", kTiny);
  ASSERT_EQ(call({"demo", "--config", config, "--out-dir", folder_ / "runs", "--stories", "30"}), 0)
      << err_;
  std::ifstream file(folder_ / "runs" / "summary.json");
  const nlohmann::json summary = nlohmann::json::parse(file);
  ASSERT_EQ(call({"eval", "recall", "--model", folder_ / "runs" / "model" / "latest", "--stories",
                  "30", "--first-story", "8", "--seq-len", "64", "--json"}),
            0)
      << err_;
  const nlohmann::json all = nlohmann::json::parse(out_)["questions"].back();
  EXPECT_EQ(all["question"], "all");
  EXPECT_EQ(all["asked"], summary["questions"]);
  EXPECT_NEAR(all["recall"].get<double>(), summary["recall"].get<double>(), 1e-4);
  EXPECT_NEAR(all["chance"].get<double>(), summary["recall_chance"].get<double>(), 1e-4);
  EXPECT_EQ(call({"eval", "recal", "--model", "x"}), 2);
  EXPECT_EQ(call({"eval", "recall", "--model", folder_ / "nothing"}), 1);
}

TEST_F(Demo, RefusesOtherData) {
  const std::string config = write("text.toml", "[data]\nkind = \"text\"\npath = \"x.txt\"\n");
  EXPECT_EQ(call({"demo", "--config", config, "--out-dir", folder_ / "runs"}), 2);
  EXPECT_THAT(err_, HasSubstr("data.kind = \"stories\""));
  EXPECT_EQ(call({"demo", "--config", folder_ / "absent.toml"}), 2);
  EXPECT_THAT(err_, HasSubstr("absent.toml"));
}

}  // namespace
}  // namespace gdn
