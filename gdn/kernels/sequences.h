// SPDX-License-Identifier: Apache-2.0
// How the tokens of a packed or equally cut batch are cut into sequences, and these into chunks
// whose first states are saved for backward. Params has num_sequences, total_tokens and cu_seqlens.
#pragma once

#include <cstdint>

namespace gdn {

struct TokenSpan {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The tokens of sequence n.
template <typename Params>
TokenSpan sequence_span(const Params& p, int64_t n) {
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  const int64_t length = p.num_sequences == 0 ? 0 : p.total_tokens / p.num_sequences;
  return {n * length, (n + 1) * length};
}

inline int64_t chunks_of(TokenSpan seq, int64_t chunk) { return (seq.size() + chunk - 1) / chunk; }

// The row of `saved` for the first chunk of sequence n. Rows may stay unused, so that their number
// does not depend on how the tokens are cut.
template <typename Params>
int64_t first_chunk(const Params& p, int64_t n, int64_t chunk) {
  return sequence_span(p, n).begin / chunk + n;
}

}  // namespace gdn
