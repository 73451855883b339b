// SPDX-License-Identifier: Apache-2.0
// What every entry point of the engine shares: argument checks and the cut of the token axis into
// sequences.
#pragma once

#include <cstdint>

#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn::delta_rule {

struct TokenRange {
  int64_t begin, end;
};

inline TokenRange sequence_range(const DeltaRuleParams& p, int64_t n) {
  if (p.cu_seqlens != nullptr) return {p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  const int64_t length = p.num_sequences == 0 ? 0 : p.total_tokens / p.num_sequences;
  return {n * length, (n + 1) * length};
}

inline bool has_a(DeltaErase erase) {
  return erase == DeltaErase::kOwn || erase == DeltaErase::kSeparate;
}

// Throws gdn::Error, prefixed with `op`, where sizes or missing inputs make the call meaningless.
void check_params(const DeltaRuleParams& params, const char* op);
void check_outputs(const DeltaRuleParams& params, const DeltaRuleOutputs& out, const char* op);
void check_grads(const DeltaRuleParams& params, const DeltaRuleGrads& grads, const char* op);

}  // namespace gdn::delta_rule
