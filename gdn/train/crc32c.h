// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli), as TensorBoard's record files use it; also guards the files of a
// checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace gdn {

// The checksum of `data` appended to bytes whose checksum is `crc`.
uint32_t crc32c(std::string_view data, uint32_t crc = 0);

}  // namespace gdn
