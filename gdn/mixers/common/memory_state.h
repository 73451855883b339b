// SPDX-License-Identifier: Apache-2.0
// What the mixers with a memory that learns at test time share: its weights as parameters, and its
// state. Entries: "memory", "momentum", "gradient_at" [N,H,P] (the last two where the configuration
// has them) and "tokens" (int64 [N], seen so far). A row with 0 tokens has seen nothing, whatever
// its other entries hold: it begins with the learned start.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <vector>

#include "gdn/mixers/common/state_access.h"
#include "gdn/mixers/mixer.h"
#include "gdn/ops/test_time_memory.h"

namespace gdn {

// Parameters W1 [H,in,out], b1 [H,1,out], W2, ... of the memories' starts; weights from N(0, std),
// or from N(0, 1 / in) where std is 0.
class MemoryWeights : public torch::nn::Module {
 public:
  MemoryWeights(int64_t heads, int64_t head_dim, const ops::MemoryConfig& config, double std);
  at::Tensor flat() const;  // [H,P]

 private:
  std::vector<at::Tensor> parameters_;
};

// Where a sequence begins.
struct MemoryStart {
  at::Tensor memory;    // [H,P]
  at::Tensor momentum;  // [H,P], undefined: zero
};

void add_memory_state(State& state, int64_t sequences, int64_t heads, int64_t head_dim,
                      const ops::MemoryConfig& config, bool eta, const at::TensorOptions& options);

// Tokens seen before this call by each of its sequences, int64 [N]; zeros without a state.
at::Tensor tokens_before(const StateAccess& state);

// Runs the memory over the call's tokens from and to the state; inputs' memory, momentum,
// gradient_at, position and cu_seqlens are filled in here. -> o [B,T,H,D].
at::Tensor memory_with_state(ops::MemoryTensors inputs, const ops::MemoryConfig& config,
                             const MemoryStart& start, StateAccess& state, bool naive);

}  // namespace gdn
