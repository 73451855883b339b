// SPDX-License-Identifier: Apache-2.0
// RWKV-4's wkv over packed sequences, each channel for itself, with log decay w <= 0 and bonus u:
//   y_t = (P_{t-1} + e^{u + k_t} v_t) / (Q_{t-1} + e^{u + k_t})
//   P_t = e^w P_{t-1} + e^{k_t} v_t,   Q_t = e^w Q_{t-1} + e^{k_t}
// A state [3, C] holds p, q and o with P = p e^o and Q = q e^o, where o is the largest exponent so
// far, so that nothing overflows. q = 0 means that nothing has been seen, whatever o says.
// Arithmetic and states are fp32 (double for double). Backward keeps one state in kWkvChunk tokens.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"

namespace gdn {

inline constexpr int64_t kWkvChunk = 64;

// T = the type of dtype; A = double where dtype is kF64, else float.
struct WkvParams {
  int64_t num_sequences = 0;            // N
  int64_t total_tokens = 0;             // T_total
  const int64_t* cu_seqlens = nullptr;  // [N+1] on the host; null: equal lengths T_total / N
  int64_t channels = 0;                 // C
  DType dtype = DType::kF32;            // of k, v, y and their gradients
  const void* w = nullptr;              // A [C]
  const void* u = nullptr;              // A [C]
  const void* k = nullptr;              // T [T_total, C]
  const void* v = nullptr;              // T [T_total, C]
  const void* initial = nullptr;        // A [N, 3, C] or null: nothing seen
};

// How many states `saved` holds: T_total / kWkvChunk + N, enough for one in kWkvChunk tokens of
// each sequence.
int64_t wkv_chunks(const WkvParams& params);

void wkv_forward(const WkvParams& params, void* y /* T [T_total, C] */,
                 void* final_state /* A [N, 3, C] or null */,
                 void* saved /* A [chunks, 3, C] or null */);

struct WkvGrads {
  const void* dy = nullptr;       // T [T_total, C]; null means 0
  const void* d_final = nullptr;  // A [N, 3, C]; null means 0
  void* dw = nullptr;             // A [C]
  void* du = nullptr;             // A [C]
  void* dk = nullptr;             // T [T_total, C]
  void* dv = nullptr;             // T [T_total, C]
  void* d_initial = nullptr;      // A [N, 3, C]; null: not wanted
};
void wkv_backward(const WkvParams& params, const void* saved /* of the forward pass */,
                  const WkvGrads& grads);

// One token for each of N sequences (k, v [N, C]; total_tokens, cu_seqlens and initial are
// ignored), in place on a pool of states: sequence n uses pool[slots[n]] (pool[n] when slots is
// null). Slots that are not negative must differ; for a negative one the output is zero and no
// state is touched.
void wkv_step(const WkvParams& params, void* pool /* A [num_slots, 3, C] */, int64_t num_slots,
              const int64_t* slots /* [N] or null */, void* y /* T [N, C] */);

// The oracle: the quotient of the two sums written out, in double for every dtype, without a
// recurrence. The gradients' members are double here; dy and d_final may be null, and so may any
// result of the backward pass.
void wkv_naive_forward(const WkvParams& params, double* y, double* final_state);
void wkv_naive_backward(const WkvParams& params, const WkvGrads& grads);

}  // namespace gdn
