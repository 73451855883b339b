// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (Su et al. 2021) in the half-split layout: with R rotary dimensions, i
// < R/2 and the angle f = position * theta^(-2i/R),
//   y[i] = x[i] cos f - x[i + R/2] sin f,   y[i + R/2] = x[i + R/2] cos f + x[i] sin f; dimensions
//   from R on pass.
// Angles are reduced in double, so that far positions keep their precision. The gradient is the
// inverse rotation.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn {

// T = the type of dtype.
struct RopeParams {
  int64_t tokens = 0, heads = 0, dim = 0;
  int64_t rotary_dim = 0;  // R: even, 0 to dim
  double theta = 10000;
  bool inverse = false;  // rotate back
  DType dtype = DType::kF32;
  const void* x = nullptr;             // T [tokens, heads, dim]
  RowLayout x_layout;                  // of the rows token * heads + head
  const int64_t* positions = nullptr;  // [tokens]
};

void rope(const RopeParams& params, void* y /* T [tokens, heads, dim] */);

// The oracle, in double for every dtype.
void rope_naive(const RopeParams& params, double* y);

}  // namespace gdn
