// SPDX-License-Identifier: Apache-2.0
// Any run.toml is refused by gdn::Error or read; what was read is written so that reading gives it
// back.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "gdn/base/check.h"
#include "gdn/train/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  gdn::RunConfig config;
  try {
    config = gdn::parse_run_config({reinterpret_cast<const char*>(data), size}, "fuzz");
    if (config.data.path.empty()) config.data.path = "given by a flag";
    gdn::validate(config);
  } catch (const gdn::Error&) {
    return 0;
  }
  if (gdn::parse_run_config(gdn::to_toml(config), "written") != config) std::abort();
  return 0;
}
