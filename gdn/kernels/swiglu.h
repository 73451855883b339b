// SPDX-License-Identifier: Apache-2.0
// SwiGLU's elementwise part (Shazeer 2020): y = gate * sigmoid(gate) * up. Arithmetic is fp32
// (double for double).
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn {

// T = the type of dtype.
struct SwigluParams {
  int64_t rows = 0, dim = 0;
  DType dtype = DType::kF32;
  const void* gate = nullptr;  // T [rows, dim]
  const void* up = nullptr;    // T [rows, dim]
  RowLayout gate_layout, up_layout;
};

void swiglu_forward(const SwigluParams& params, void* y /* T [rows, dim] */);
void swiglu_backward(const SwigluParams& params, const void* dy /* T [rows, dim] */,
                     void* dgate /* T [rows, dim] */, void* dup /* T [rows, dim] */);

// The oracle, in double for every dtype.
void swiglu_naive_forward(const SwigluParams& params, double* y);
void swiglu_naive_backward(const SwigluParams& params, const double* dy, double* dgate,
                           double* dup);

}  // namespace gdn
