// SPDX-License-Identifier: Apache-2.0
// What every entry point of the engine shares: argument checks and the cut of the token axis into
// sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "gdn/kernels/delta_rule/delta_rule.h"
#include "gdn/kernels/sequences.h"

namespace gdn::delta_rule {

inline bool has_a(DeltaErase erase) {
  return erase == DeltaErase::kOwn || erase == DeltaErase::kSeparate;
}

// Added to the sum of squares of a query or key that is normalised.
inline constexpr double kL2NormEps = 1e-6;

// Tokens per chunk. The measurements behind the automatic choice are in README.md.
inline int64_t chunk_size(const DeltaRuleParams& p) {
  return p.chunk_size != 0 ? p.chunk_size : 16;
}

// `saved` holds the solved values U without their beta [T_total,HV,V] (none without an erase), then
// the state at each token that is a multiple of segment(), but the first, of each sequence,
// [sequence][value head][index][K,V]; backward recomputes the states between. The segment is as
// short as keeps all this below 1.4 times the inputs.
inline int64_t segment(const DeltaRuleParams& p) {
  const double values = p.erase == DeltaErase::kNone ? 0 : p.V;
  const double inputs = static_cast<double>(2 * p.K * p.H) / static_cast<double>(p.HV) + p.V;
  int64_t tokens = 64;
  while (tokens < 256 && values + static_cast<double>(p.K * p.V / tokens) > 1.4 * inputs) {
    tokens *= 2;
  }
  return tokens;
}

inline int64_t saved_states(const DeltaRuleParams& p, int64_t tokens) {
  return tokens == 0 ? 0 : (tokens - 1) / segment(p);
}
inline int64_t saved_values_size(const DeltaRuleParams& p) {
  return p.erase == DeltaErase::kNone ? 0 : p.total_tokens * p.HV * p.V;
}
// Offset in `saved` of the first state of each sequence, and the whole size at the end: [N + 1].
inline std::vector<int64_t> saved_offsets(const DeltaRuleParams& p) {
  std::vector<int64_t> offsets(p.num_sequences + 1, saved_values_size(p));
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const auto range = sequence_span(p, n);
    offsets[n + 1] = offsets[n] + saved_states(p, range.size()) * p.HV * p.K * p.V;
  }
  return offsets;
}

// Throws gdn::Error, prefixed with `op`, where sizes or missing inputs make the call meaningless.
void check_params(const DeltaRuleParams& params, const char* op);
void check_outputs(const DeltaRuleParams& params, const DeltaRuleOutputs& out, const char* op);
void check_grads(const DeltaRuleParams& params, const DeltaRuleGrads& grads, const char* op);

}  // namespace gdn::delta_rule
