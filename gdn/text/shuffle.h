// SPDX-License-Identifier: Apache-2.0
// A random order of n things whose i-th element is computed directly, so that a data source needs
// no memory of what it has drawn and can start anywhere.
#pragma once

#include <bit>
#include <cstdint>

#include "gdn/base/rng.h"

namespace gdn {

// A permutation of 0..n-1: a Feistel network over the next power of four, walked until it lands
// below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed, uint64_t stream) : n_(n) {
    half_bits_ = n <= 1 ? 1 : (std::bit_width(n - 1) + 1) / 2;
    Rng rng(seed, stream);
    for (uint64_t& key : keys_) key = rng.next();
  }

  uint64_t operator[](uint64_t i) const {
    do i = encrypt(i);
    while (i >= n_);
    return i;
  }

 private:
  uint64_t encrypt(uint64_t x) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (const uint64_t key : keys_) {
      const uint64_t next = left ^ (Rng(key ^ right).next() & mask);
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }

  uint64_t n_;
  int half_bits_;
  uint64_t keys_[6];
};

}  // namespace gdn
