// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gdn/cli/cli.h"

namespace gdn {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

struct Result {
  int status;
  std::string out, err;
};

Result call(std::initializer_list<std::string> words) {
  std::vector<std::string> args = {"gdn"};
  args.insert(args.end(), words);
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  const int status = run_main(static_cast<int>(argv.size()), argv.data());
  Result result{status, ::testing::internal::GetCapturedStdout(), ""};
  result.err = ::testing::internal::GetCapturedStderr();
  return result;
}

TEST(Frame, HelpAndVersionGoToStdout) {
  const Result help = call({"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.out, HasSubstr("info"));
  EXPECT_EQ(help.err, "");
  const Result version = call({"--version"});
  EXPECT_EQ(version.status, 0);
  EXPECT_THAT(version.out, StartsWith("gdn "));
  EXPECT_THAT(version.out, HasSubstr("torch "));
  EXPECT_THAT(call({"info", "--help"}).out, HasSubstr("--json"));
}

TEST(Frame, WrongUsageIsOneLineAndAHint) {
  const Result command = call({"inof"});
  EXPECT_EQ(command.status, 2);
  EXPECT_EQ(command.out, "");
  EXPECT_THAT(command.err,
              StartsWith("gdn: error: unknown command \"inof\" (did you mean \"info\"?)\n"));
  const Result flag = call({"info", "--jsno=1"});
  EXPECT_EQ(flag.status, 2);
  EXPECT_EQ(flag.err,
            "gdn: error: unknown flag --jsno (did you mean \"--json\"?)\n"
            "gdn: hint: `gdn info --help` lists what is possible\n");
  EXPECT_EQ(call({}).status, 2);
  EXPECT_EQ(call({"info", "-z"}).status, 2);
}

TEST(Frame, InfoOnTheBuild) {
  const Result result = call({"info", "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  const auto info = nlohmann::json::parse(result.out);
  EXPECT_GE(info.at("threads").get<int>(), 1);
  EXPECT_FALSE(info.at("simd_targets").empty());
  EXPECT_THAT(call({"info"}).out, HasSubstr("SIMD targets"));
}

}  // namespace
}  // namespace gdn
