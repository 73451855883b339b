// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "gdn/mixers/mixer.h"
#include "tests/cli/support.h"

namespace gdn {
namespace {

using cli_testing::call;
using cli_testing::Result;
using ::testing::HasSubstr;
using ::testing::StartsWith;

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

TEST(Frame, MixersListsTheRegistry) {
  const Result json = call({"mixers", "--json"});
  ASSERT_EQ(json.status, 0) << json.err;
  const auto list = nlohmann::json::parse(json.out);
  ASSERT_EQ(list.size(), mixers().size());
  for (size_t i = 0; i < list.size(); ++i) {
    EXPECT_EQ(list[i]["name"], mixers()[i].name);
    EXPECT_GT(list[i]["state"]["bytes_after_512_tokens"].get<int64_t>(), 0);
    EXPECT_FALSE(list[i]["options"].empty());
  }
  const Result table = call({"mixers"});
  EXPECT_EQ(table.status, 0) << table.err;
  for (const MixerInfo& info : mixers()) EXPECT_THAT(table.out, HasSubstr(info.name));
}

TEST(Frame, MechanismsNeedNoModel) {
  const Result json = call({"eval", "mechanisms", "--json"});
  ASSERT_EQ(json.status, 0) << json.err;
  const auto tables = nlohmann::json::parse(json.out).at("tables");
  EXPECT_EQ(tables.size(), 6u);
  EXPECT_EQ(tables[0].at("name"), "once");
  EXPECT_EQ(tables[0].at("rows")[0].at("recall").size(), tables[0].at("pairs").size());
  const Result recall = call({"eval", "recall"});
  EXPECT_EQ(recall.status, 2);
  EXPECT_THAT(recall.err, HasSubstr("[eval] recall needs --model"));
}

}  // namespace
}  // namespace gdn
