// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace gdn {

// Makes malloc keep what is freed instead of giving it back to the kernel: a training step frees
// and takes the same large tensors again and again, and fresh pages cost a fault and 4 KiB of zeros
// each. For the whole process; call it once, early.
void keep_freed_memory();

}  // namespace gdn
