// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/scratch.h"

#include <atomic>
#include <cstring>

#include "gdn/base/pages.h"

namespace gdn {
namespace {
std::atomic<bool> poisoned{false};
}  // namespace

void poison_scratch(bool on) { poisoned = on; }

uint8_t* thread_scratch(size_t bytes) {
  thread_local PageVector<uint8_t> block;
  // A whole huge page for the scratch memory of the larger kernels.
  if (bytes > kHugePage / 8) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (block.size() < bytes) {
    block = {};
    block.resize(bytes);
  }
  if (poisoned.load(std::memory_order_relaxed)) std::memset(block.data(), 0xff, bytes);
  return block.data();
}

}  // namespace gdn
