# SPDX-License-Identifier: Apache-2.0
# Run at every build: writes OUT, the header with version and commit, when one of its lines has changed.
file(STRINGS "${SOURCE}/VERSION" version LIMIT_COUNT 1)
execute_process(COMMAND git -C "${SOURCE}" rev-parse --short=9 HEAD OUTPUT_VARIABLE commit
  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
if(failed)
  set(commit "unknown")
endif()
file(CONFIGURE OUTPUT "${OUT}" @ONLY CONTENT [[
// Made by cmake/GdnBuildInfo.cmake.
#pragma once
#define GDN_VERSION "@version@"
#define GDN_GIT_HASH "@commit@"
#define GDN_COMPILER "@COMPILER@"
#define GDN_BUILD_TYPE "@BUILD_TYPE@"
]])
