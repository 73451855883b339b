// SPDX-License-Identifier: Apache-2.0
// Short causal depthwise convolution over packed sequences, with optional bias and SiLU:
//   y[t] = act(bias + sum_j weight[:, j] * x[t - (W - 1) + j]),   j = 0 .. W-1
// Inputs from before a sequence's first token come from its history, or are zero. A history [C, W]
// holds the last W inputs, the newest in column W-1 (so the next token needs the last W-1 columns
// only). Arithmetic is fp32 (double for double), and a step gives the same bits as the forward
// pass.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"

namespace gdn {

inline constexpr int kMaxConvWidth = 8;

// T = the type of dtype; A = double where dtype is kF64, else float.
struct ShortConvParams {
  int64_t num_sequences = 0;            // N
  int64_t total_tokens = 0;             // T_total
  const int64_t* cu_seqlens = nullptr;  // [N+1] on the host; null: equal lengths T_total / N
  int64_t channels = 0;                 // C
  int width = 4;                        // W, 1 to kMaxConvWidth
  DType dtype = DType::kF32;            // of x, y, histories and their gradients
  bool silu = true;
  const void* x = nullptr;        // T [T_total, C], rows x_stride elements apart
  int64_t x_stride = 0;           // 0: C
  const void* weight = nullptr;   // A [C, W]
  const void* bias = nullptr;     // A [C] or null
  const void* initial = nullptr;  // T [N, C, W] or null: zeros
};

void short_conv_forward(const ShortConvParams& params, void* y /* T [T_total, C] */,
                        void* final_history /* T [N, C, W] or null */);

struct ShortConvGrads {
  const void* dy = nullptr;       // T [T_total, C]; null means 0
  const void* d_final = nullptr;  // T [N, C, W]; null means 0
  void* dx = nullptr;             // T [T_total, C]
  void* dweight = nullptr;        // A [C, W]
  void* dbias = nullptr;          // A [C]; null: not wanted
  void* d_initial = nullptr;      // T [N, C, W]; null: not wanted
};
void short_conv_backward(const ShortConvParams& params, const ShortConvGrads& grads);

// One token for each of N sequences (x [N, C]; total_tokens, cu_seqlens and initial are ignored),
// in place on a pool of histories: sequence n uses pool[slots[n]] (pool[n] when slots is null).
// Slots that are not negative must differ; a negative one means "no sequence here": its output is
// zero and no history is touched.
void short_conv_step(const ShortConvParams& params, void* pool /* T [num_slots, C, W] */,
                     int64_t num_slots, const int64_t* slots /* [N] or null */,
                     void* y /* T [N, C] */);

// The oracle, in double for every dtype. dy and d_final are double here and may be null; so may
// d_initial and dbias.
void short_conv_naive_forward(const ShortConvParams& params, double* y, double* final_history);
void short_conv_naive_backward(const ShortConvParams& params, const double* dy,
                               const double* d_final, double* dx, double* dweight, double* dbias,
                               double* d_initial);

}  // namespace gdn
