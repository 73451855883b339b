// SPDX-License-Identifier: Apache-2.0
// The cut of a sequence into chunks and segments, which forward and backward must agree on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gdn/kernels/test_time_memory/memory.h"

namespace gdn::test_time_memory {

// Tokens in one call of the chunk step; with the exact form of depth 1 only a tile.
inline int64_t tile(const MemoryParams& p) { return p.sequential ? 16 : p.chunk; }

struct Tokens {
  int64_t begin, end, position;
};

inline Tokens tokens_of(const MemoryParams& p, int64_t n) {
  const int64_t position = p.position != nullptr ? p.position[n] : 0;
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1], position};
  return {n * p.T, (n + 1) * p.T, position};
}

// Tokens of the chunk that begins at token t: up to the next multiple of the chunk's size.
inline int64_t count_from(const MemoryParams& p, const Tokens& s, int64_t t) {
  const int64_t size = tile(p);
  const int64_t at = p.sequential ? 0 : (s.position + t - s.begin) % size;
  return std::min(size - at, s.end - t);
}

inline int64_t num_chunks(const MemoryParams& p, const Tokens& s) {
  if (s.begin == s.end) return 0;
  const int64_t size = tile(p), at = p.sequential ? 0 : s.position % size;
  return (at + s.end - s.begin + size - 1) / size;
}

// Chunks per segment: only a segment's first state is kept for the backward pass, which runs the
// segment's chunks again. Near the root of the number of chunks, so that both sides stay small.
inline int64_t segment(const MemoryParams& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n)
    longest = std::max(longest, num_chunks(p, tokens_of(p, n)));
  return std::clamp<int64_t>(
      static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(longest)))), 1, 16);
}

// States kept of one head: of all segments but the first, whose state is the call's.
inline int64_t num_kept(int64_t chunks, int64_t segment) {
  return chunks == 0 ? 0 : (chunks - 1) / segment;
}

// TTT's sum is zero where a segment begins.
inline int64_t tensors_per_state(const MemoryParams& p) {
  return p.rule == MemoryRule::kLmm && p.eta != nullptr ? 2 : 1;
}

}  // namespace gdn::test_time_memory
