// SPDX-License-Identifier: Apache-2.0
// Mamba's selective scan over packed sequences, C channels with S states each:
//   dt_t = softplus(dt_t + dt_bias)                          (or as given, without softplus)
//   h_t[c,s] = a_t[c,s] h_{t-1}[c,s] + dt_t[c] x_t[c] B_t[s],   a = exp(dt A) or 2 exp(dt A) - 1
//   y_t[c] = sum_s C_t[s] h_t[c,s] + D[c] x_t[c]
// Arithmetic and states are fp32 (double for double). Backward keeps one state in kScanChunk tokens
// and computes those between again.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"

namespace gdn {

inline constexpr int64_t kScanChunk = 32;

// T = the type of dtype; A = double where dtype is kF64, else float.
struct SelectiveScanParams {
  int64_t num_sequences = 0;            // N
  int64_t total_tokens = 0;             // T_total
  const int64_t* cu_seqlens = nullptr;  // [N+1] on the host; null: equal lengths T_total / N
  int64_t channels = 0;                 // C
  int64_t states = 0;                   // S
  DType dtype = DType::kF32;            // of x, dt, B, C, y and their gradients
  bool softplus = true;                 // of dt + dt_bias
  bool signed_transition = false;       // a in (-1, 1] instead of (0, 1]
  const void* x = nullptr;              // T [T_total, C]
  const void* dt = nullptr;             // T [T_total, C]
  const void* A = nullptr;              // A [C, S], not positive
  const void* B = nullptr;              // T [T_total, S]
  const void* C = nullptr;              // T [T_total, S]
  const void* D = nullptr;              // A [C] or null: 0
  const void* dt_bias = nullptr;        // A [C] or null: 0
  const void* initial = nullptr;        // A [N, C, S] or null: zeros
};

// How many states `saved` holds: T_total / kScanChunk + N, enough for one in kScanChunk tokens of
// each sequence.
int64_t selective_scan_chunks(const SelectiveScanParams& params);

void selective_scan_forward(const SelectiveScanParams& params, void* y /* T [T_total, C] */,
                            void* final_state /* A [N, C, S] or null */,
                            void* saved /* A [chunks, S, C] or null */);

struct SelectiveScanGrads {
  const void* dy = nullptr;       // T [T_total, C]; null means 0
  const void* d_final = nullptr;  // A [N, C, S]; null means 0
  void* dx = nullptr;             // T [T_total, C]
  void* ddt = nullptr;            // T [T_total, C]
  void* dA = nullptr;             // A [C, S]
  void* dB = nullptr;             // T [T_total, S]
  void* dC = nullptr;             // T [T_total, S]
  void* dD = nullptr;             // A [C]; null: not wanted
  void* ddt_bias = nullptr;       // A [C]; null: not wanted
  void* d_initial = nullptr;      // A [N, C, S]; null: not wanted
};
void selective_scan_backward(const SelectiveScanParams& params,
                             const void* saved /* of the forward pass */,
                             const SelectiveScanGrads& grads);

// One token for each of N sequences (x, dt [N, C], B, C [N, S]; total_tokens, cu_seqlens and
// initial are ignored), in place on a pool of states: sequence n uses pool[slots[n]] (pool[n] when
// slots is null). Slots that are not negative must differ; for a negative one the output is zero
// and no state is touched.
void selective_scan_step(const SelectiveScanParams& params, void* pool /* A [num_slots, C, S] */,
                         int64_t num_slots, const int64_t* slots /* [N] or null */,
                         void* y /* T [N, C] */);

// The oracle: token by token in double for every dtype. The gradients' members are double here; dy
// and d_final may be null, and so may any result of the backward pass.
void selective_scan_naive_forward(const SelectiveScanParams& params, double* y,
                                  double* final_state);
void selective_scan_naive_backward(const SelectiveScanParams& params,
                                   const SelectiveScanGrads& grads);

}  // namespace gdn
