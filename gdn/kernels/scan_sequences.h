// SPDX-License-Identifier: Apache-2.0
// How the tokens of an elementwise recurrence are cut into sequences, and these into chunks whose
// first states are saved for backward. Params has num_sequences, total_tokens and cu_seqlens.
#pragma once

#include <cstdint>

namespace gdn::scan {

struct Span {
  int64_t begin, end;  // tokens
};

template <typename Params>
Span sequence(const Params& p, int64_t n) {
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  const int64_t length = p.num_sequences == 0 ? 0 : p.total_tokens / p.num_sequences;
  return {n * length, (n + 1) * length};
}

inline int64_t chunks_of(Span seq, int64_t chunk) {
  return (seq.end - seq.begin + chunk - 1) / chunk;
}

// The row of `saved` for the first chunk of sequence n. Rows may stay unused, so that their number
// does not depend on how the tokens are cut.
template <typename Params>
int64_t first_chunk(const Params& p, int64_t n, int64_t chunk) {
  return sequence(p, n).begin / chunk + n;
}

}  // namespace gdn::scan
