// SPDX-License-Identifier: Apache-2.0
// Memories that learn at test time, TTT and Titans; gdn/kernels/test_time_memory/README.md has the
// formulas. fp32, bf16 and fp16 inputs are computed in fp32, fp64 in fp64; weights, states and
// gates are fp32 (fp64).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace gdn::ops {

struct MemoryConfig {
  std::string rule = "lmm";         // "ttt" or "lmm"
  std::string activation = "silu";  // between the layers: "silu" or "gelu" (tanh form)
  int64_t depth = 1, hidden = 0;    // layers, width between them
  bool bias = false;
  int64_t chunk = 16;       // tokens whose gradients are taken at the same weights
  bool sequential = false;  // depth 1: gradients at the weights before each token, chunk-parallel
  bool read_before = false;
  double norm_eps = 1e-6;
  double loss_scale = 1;  // c of c/2 |f(k) - v|^2
  double clip = 0;        // of a token's gradient in a layer; 0: none
};

// Undefined where absent. P = test_time_memory_size, flat weights of a head.
struct MemoryTensors {
  at::Tensor q, k, v;      // [B,T,H,D]
  at::Tensor rate;         // [B,T,H]: eta of TTT, theta of LMM
  at::Tensor eta, alpha;   // [B,T,H]: momentum and forgetting of LMM; absent: none
  at::Tensor tau;          // [chunk], TTT
  at::Tensor anchor;       // [H,P]: what forgetting leads to; absent: zero
  at::Tensor norm_weight;  // [H,D]: f(x) = x + LN(z(x)); absent: f = z
  at::Tensor norm_bias;    // [H,D]
  // The state the call starts from, [N,H,P]; absent momentum: zero, absent gradient_at: memory.
  at::Tensor memory, momentum, gradient_at;
  at::Tensor position;    // int64 [N] on the host, tokens seen before; absent: 0
  at::Tensor cu_seqlens;  // int64 [N+1]; requires B == 1
};

struct MemoryResult {
  at::Tensor o;         // [B,T,H,D] in the dtype of q
  at::Tensor memory;    // [N,H,P] as the next two, where the final state was asked for
  at::Tensor momentum;  // undefined where the rule has none
  at::Tensor gradient_at;
};

// Whether states of this configuration have these tensors.
bool has_momentum(const MemoryConfig& config, bool eta_given);
bool has_gradient_at(const MemoryConfig& config);

MemoryResult test_time_memory(const MemoryTensors& inputs, const MemoryConfig& config,
                              bool output_final_state);

// One token per sequence, q [N,1,H,D], in place on the pools that inputs.memory, momentum and
// gradient_at are: [slots,H,P]. inputs.position is [N] of the sequences, not of the pool, and is
// not changed. A negative slot is skipped. slots: int64 [N] on the host or undefined.
at::Tensor test_time_memory_step_(const MemoryTensors& inputs, const MemoryConfig& config,
                                  const at::Tensor& slots);

// What the memories with weights [N,H,P] answer to q [N,T,H,D]; differentiable.
at::Tensor test_time_memory_read(const at::Tensor& q, const at::Tensor& weights,
                                 const MemoryTensors& inputs, const MemoryConfig& config);

// The definition: token by token in double, the inner gradients by autograd. Differentiable.
namespace naive {
MemoryResult test_time_memory(const MemoryTensors& inputs, const MemoryConfig& config);
}

}  // namespace gdn::ops
