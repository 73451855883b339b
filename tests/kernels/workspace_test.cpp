// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "tests/kernels/poisoned_workspace.h"

namespace gdn {
namespace {

// What a call wrote into it does not reach the next one, whatever the sizes of the two.
TEST(Workspace, IsPoisonedAtEachUse) {
  for (const size_t bytes : {size_t{64}, size_t{100000}, size_t{3} << 20, size_t{1000}}) {
    uint8_t* block = thread_scratch(bytes);
    EXPECT_EQ(std::count(block, block + bytes, 0xff), static_cast<int64_t>(bytes));
    std::fill_n(block, bytes, uint8_t{0});
  }
}

}  // namespace
}  // namespace gdn
