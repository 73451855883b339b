// SPDX-License-Identifier: Apache-2.0
// Any config.json is refused by gdn::Error or read; what was read and written is read again as the
// same.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "gdn/base/check.h"
#include "gdn/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const nlohmann::json json =
      nlohmann::json::parse(data, data + size, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return 0;
  gdn::ModelConfig config;
  try {
    config = gdn::model_config_from_json(json);
    config.validate();
  } catch (const gdn::Error&) {
    return 0;
  }
  // Writing spells out what was left to a default, so it is compared with what is written the
  // second time.
  const nlohmann::json written = gdn::to_json(config);
  if (gdn::to_json(gdn::model_config_from_json(written)) != written) std::abort();
  return 0;
}
