// SPDX-License-Identifier: Apache-2.0
// Memories that learn at test time: TTT (arXiv 2407.04620) and the long-term memory of Titans
// (arXiv 2501.00663), one small network per head whose weights are trained by the tokens that pass.
// Formulas, forward and backward: README.md of this folder. Tensors are dense and of one type T,
// float or double. Weights of one head are flat: the layers one after another, each
// [in (+ 1 with bias), out], the bias as the last row.
#pragma once

#include <cstdint>
#include <vector>

#include "gdn/base/dtype.h"

namespace gdn {

enum class MemoryRule : uint8_t {
  kTtt,  // W_t = W_start - tau_t sum_s rate_s grad_s in the mini-batch
  kLmm,  // S_t = eta_t S - rate_t grad_t;  M_t = (1 - alpha_t) M + S_t
};
enum class MemoryActivation : uint8_t { kSilu, kGelu };  // between layers; gelu by tanh

struct MemoryParams {
  DType dtype = DType::kF32;  // kF32 or kF64
  MemoryRule rule = MemoryRule::kLmm;
  MemoryActivation activation = MemoryActivation::kSilu;
  int64_t num_sequences = 0, T = 0, H = 0, D = 0;
  int64_t depth = 1, hidden = 0;  // layers; width between them
  bool bias = false;
  // f(x) = x + LN(z(x)) with the head's gain and offset, else z(x).
  bool residual_norm = false;
  double norm_eps = 1e-6;
  // Tokens whose gradients are taken at the same weights, those of the chunk's start.
  int64_t chunk = 16;
  // Gradients at the weights before each token, by a triangular solve: depth 1, plain, no clip, no
  // anchor; the chunk is then a tile only.
  bool sequential = false;
  bool read_before = false;  // kLmm: a token reads the memory before its own update
  double loss_scale = 1;     // c of the inner loss c/2 |f(k) - v|^2
  double clip = 0;           // upper bound of the norm of a token's gradient in a layer; 0: none

  const void* q = nullptr;            // [tokens,H,D], tokens = num_sequences * T or cu_seqlens' end
  const void* k = nullptr;            // [tokens,H,D]
  const void* v = nullptr;            // [tokens,H,D]
  const void* rate = nullptr;         // [tokens,H], eta of TTT, theta of LMM
  const void* eta = nullptr;          // kLmm: momentum [tokens,H]; null: no momentum
  const void* alpha = nullptr;        // kLmm: forgetting [tokens,H]; null: none
  const void* tau = nullptr;          // kTtt: [chunk], factor by position in the mini-batch
  const void* anchor = nullptr;       // kLmm: [H,P], the weights that forgetting leads to; null: 0
  const void* norm_weight = nullptr;  // [H,D], residual_norm
  const void* norm_bias = nullptr;    // [H,D]
  const int64_t* cu_seqlens = nullptr;  // [num_sequences + 1]
  const int64_t* position = nullptr;    // [num_sequences], tokens seen before; null: 0

  // Where the call starts, [num_sequences,H,P]. `memory`: M, or the weights at the start of the
  // mini-batch. `momentum`: S, or the sum of the mini-batch so far; null: 0. `gradient_at`: the
  // weights at which the chunk that is under way takes its gradients, for kLmm in the middle of a
  // chunk; null: `memory`.
  const void* memory = nullptr;
  const void* momentum = nullptr;
  const void* gradient_at = nullptr;
};

struct MemoryOutputs {
  void* o = nullptr;            // [tokens,H,D]
  void* memory = nullptr;       // [num_sequences,H,P]; null: not wanted, as the next two
  void* momentum = nullptr;     // as params.momentum; kTtt and kLmm with eta
  void* gradient_at = nullptr;  // kLmm
  void* saved = nullptr;        // test_time_memory_saved_size numbers for the backward pass
};

// Every gradient is written, not added to. Null inputs: zero gradients; null results: not wanted.
struct MemoryGrads {
  const void* o = nullptr;  // [tokens,H,D]
  const void* memory_out = nullptr;
  const void* momentum_out = nullptr;
  const void* gradient_at_out = nullptr;
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  void* rate = nullptr;
  void* eta = nullptr;
  void* alpha = nullptr;
  void* tau = nullptr;          // [num_sequences,H,chunk], to be summed
  void* anchor = nullptr;       // [num_sequences,H,P], to be summed
  void* norm_weight = nullptr;  // [num_sequences,H,D], to be summed
  void* norm_bias = nullptr;    // [num_sequences,H,D], to be summed
  void* memory = nullptr;       // [num_sequences,H,P]
  void* momentum = nullptr;
  void* gradient_at = nullptr;
};

// One token for each sequence, in place on a pool of states; a decoding step.
struct MemoryStep {
  const MemoryParams* params = nullptr;  // T 1; memory, momentum, gradient_at, position are unused
  void* memory = nullptr;                // [slots,H,P]
  void* momentum = nullptr;              // null where the rule has none
  void* gradient_at = nullptr;           // null with chunk 1, sequential, and kTtt
  const int64_t* position = nullptr;     // [num_sequences]
  const int64_t* slots = nullptr;  // [num_sequences], negative: no sequence; null: n uses slot n
  void* o = nullptr;               // [num_sequences,H,D]
};

// P, the weights of one head's network.
int64_t test_time_memory_size(int64_t D, int64_t depth, int64_t hidden, bool bias);

int64_t test_time_memory_saved_size(const MemoryParams& params);
void test_time_memory_forward(const MemoryParams& params, const MemoryOutputs& out);
void test_time_memory_backward(const MemoryParams& params, const void* saved,
                               const MemoryGrads& grads);
void test_time_memory_step(const MemoryStep& step);

}  // namespace gdn
