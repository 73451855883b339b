// SPDX-License-Identifier: Apache-2.0
// L2 norm, RMS norm and gated RMS norm over the last dimension, one kernel for the three:
//   r = 1 / sqrt(m * sum x^2 + eps)      m = 1 (kL2) or 1 / dim (kRms)
//   y = x * r * weight * act(gate)       weight and gate where given
// The arithmetic is fp32 (double for double) until y is stored. Backward computes r again: it has
// to read x anyway.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn {

enum class NormKind : uint8_t { kL2, kRms };
enum class NormGate : uint8_t { kSilu, kSigmoid };

// T = the type of dtype; A = double where dtype is kF64, else float.
struct NormParams {
  NormKind kind = NormKind::kRms;
  int64_t rows = 0, dim = 0;
  DType dtype = DType::kF32;  // of x, gate, y and their gradients
  double eps = 0;
  const void* x = nullptr;  // T [rows, dim]
  RowLayout x_layout;
  const void* weight = nullptr;  // A [dim]; null: ones
  const void* gate = nullptr;    // T [rows, dim]; null: no gate
  RowLayout gate_layout;
  NormGate activation = NormGate::kSilu;
  // A residual sum on the way: the norm is of x + add_scale * add, rounded to T.
  const void* add = nullptr;  // T [rows, dim]; null: none
  RowLayout add_layout;
  double add_scale = 1;
};

// Outputs are contiguous. `sum` takes the sum where params.add is given.
void norm_forward(const NormParams& params, void* y /* T [rows, dim] */,
                  void* sum = nullptr /* T [rows, dim] */);

// Where there was a residual sum, x is that sum here, params.add is null, and the gradient of `add`
// is add_scale times dx.
struct NormGrads {
  const void* dy = nullptr;  // T [rows, dim]
  RowLayout dy_layout;
  void* dx = nullptr;          // T [rows, dim]
  void* dgate = nullptr;       // T [rows, dim], with a gate
  void* dweight = nullptr;     // A [dim]; null: not wanted
  const void* dsum = nullptr;  // T [rows, dim], added to dx; null: none
  RowLayout dsum_layout = {};
};
void norm_backward(const NormParams& params, const NormGrads& grads);

// The oracle, in double for every dtype; dy as in NormGrads, all other pointers double arrays or
// null.
void norm_naive_forward(const NormParams& params, double* y);
void norm_naive_backward(const NormParams& params, const double* dy, double* dx, double* dgate,
                         double* dweight);

}  // namespace gdn
