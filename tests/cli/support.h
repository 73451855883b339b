// SPDX-License-Identifier: Apache-2.0
// Calls the program in this process.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "gdn/cli/cli.h"

namespace gdn::cli_testing {

struct Result {
  int status;
  std::string out, err;
};

inline Result call(const std::vector<std::string>& words) {
  std::vector<std::string> args = {"gdn"};
  args.insert(args.end(), words.begin(), words.end());
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  const int status = run_main(static_cast<int>(argv.size()), argv.data());
  Result result{status, ::testing::internal::GetCapturedStdout(), ""};
  result.err = ::testing::internal::GetCapturedStderr();
  return result;
}

}  // namespace gdn::cli_testing
