// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace gdn::delta_rule {

// At least `bytes` of 64-byte aligned memory of the calling thread, kept for its next call:
// allocating the few hundred KiB of a worker anew would cost page faults worth several chunks.
uint8_t* thread_scratch(size_t bytes);

}  // namespace gdn::delta_rule
