// SPDX-License-Identifier: Apache-2.0
// Passes over memory: the yardstick of kernels that memory limits.
#pragma once

#include <cstddef>

namespace gdn::bench {

// x[i] <- 0.999 x[i] for n floats, on all threads. `block` floats are handed out together.
void update_in_place(float* x, size_t n, size_t block);

// The same, but each block is first summed up, as a step must read a whole state before it can
// update it.
void read_then_update(float* x, size_t n, size_t block);

}  // namespace gdn::bench
