// SPDX-License-Identifier: Apache-2.0
// y = x weight^T + bias for a few rows of x, as decoding has them: then a product is bound by
// reading the weights, and libraries made for large products spend more on getting ready. Several
// weights that multiply the same x are one call. A row's result depends neither on the other rows
// nor on the number of threads.
#pragma once

#include <cstdint>
#include <span>

#include "gdn/base/dtype.h"

namespace gdn {

// T = the type of dtype, fp32 or bf16; sums are fp32.
struct MatvecWeight {
  const void* weight = nullptr;  // T [out, in]
  const void* bias = nullptr;    // T [out] or null
  int64_t out = 0;
  void* y = nullptr;  // T [rows, out], rows y_stride elements apart
  int64_t y_stride = 0;
};

struct MatvecParams {
  int64_t rows = 0, in = 0;
  DType dtype = DType::kF32;
  const void* x = nullptr;  // T [rows, in], rows x_stride elements apart
  int64_t x_stride = 0;
  std::span<const MatvecWeight> weights;
};

void matvec(const MatvecParams& params);

// The oracle, in double for both dtypes: y[i] is that of weights[i], double [rows, out].
void matvec_naive(const MatvecParams& params, std::span<double* const> y);

}  // namespace gdn
