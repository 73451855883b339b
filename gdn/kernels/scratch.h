// SPDX-License-Identifier: Apache-2.0
// Scratch memory of kernels that need a few hundred KiB per thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gdn {

// At least `bytes` of 64-byte aligned memory of the calling thread, kept for its next call:
// allocating the few hundred KiB of a worker anew would cost page faults worth several chunks.
uint8_t* thread_scratch(size_t bytes);

// For tests: while it is on, thread_scratch fills what it hands out with NaN of any type (bytes of
// 0xff), so that a read of what a call has not written shows in its results.
void poison_scratch(bool on);

// Hands out aligned pieces of one block; a first pass with base null finds the block's size.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <typename T>
  T* take(size_t count) {
    T* p = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace gdn
