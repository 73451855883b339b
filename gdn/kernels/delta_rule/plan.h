// SPDX-License-Identifier: Apache-2.0
// How a call of the chunk form is cut into tasks for threads. The cut never changes a result: heads
// do not add up across tasks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn::delta_rule {

// Heads [h0, h1) of sequence n; forward: columns [v0, v1) of their values.
struct Task {
  int64_t n, h0, h1, v0, v1;
};

struct Plan {
  std::vector<Task> tasks;     // of one thread each
  std::vector<Task> together;  // of all threads, after those
  int64_t heads = 1;           // of a task at most
};

// Whether bf16 inputs are multiplied as bf16 (simd/pairs.h), not converted to fp32.
bool by_pairs(const DeltaRuleParams& params);
void pair_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out);
void pair_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads);
// Tokens per chunk then.
inline int64_t pair_chunk_size(const DeltaRuleParams& params) {
  return params.chunk_size != 0 ? params.chunk_size : 32;
}

// Value heads forward, key heads backward; columns of a panel of values, bytes of a value head's
// state.
Plan forward_plan(const DeltaRuleParams& params, int64_t panel_width, size_t state_bytes);
Plan backward_plan(const DeltaRuleParams& params, int64_t panel_width, size_t state_bytes);

}  // namespace gdn::delta_rule
