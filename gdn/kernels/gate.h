// SPDX-License-Identifier: Apache-2.0
// The gates of the delta-rule family, from raw projections to what the engine takes:
//   decay   g = -exp(A_log) * softplus(a + dt_bias)                    natural log, <= 0
//   safe    g = lower_bound * sigmoid(exp(A_log) * (a + dt_bias))      in (lower_bound, 0);
//   lower_bound < 0 write   beta = scale * sigmoid(b)                                  scale 2
//   allows negative eigenvalues
// A_log is per head; a and dt_bias are per head (Gated DeltaNet, channels 1) or per key channel
// (KDA, channels K).
#pragma once

#include <cstdint>
#include <optional>

#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn {

// T = the type of dtype; A = double where dtype is kF64, else float.
struct GateParams {
  int64_t rows = 0;           // tokens
  int64_t heads = 0;          // HV
  int64_t channels = 1;       // per head: 1 or K
  DType dtype = DType::kF32;  // of a and its gradient
  const void* a = nullptr;    // T [rows, heads * channels]
  RowLayout a_layout;
  const void* A_log = nullptr;    // A [heads]
  const void* dt_bias = nullptr;  // A [heads * channels]; null: zeros
  std::optional<double> lower_bound;
};

void gate_forward(const GateParams& params, void* g /* A [rows, heads * channels] */);

struct GateGrads {
  const void* dg = nullptr;  // A [rows, heads * channels]
  void* da = nullptr;        // T [rows, heads * channels]
  void* dA_log = nullptr;    // A [heads]
  void* ddt_bias = nullptr;  // A [heads * channels]; null: not wanted
};
void gate_backward(const GateParams& params, const GateGrads& grads);

struct BetaParams {
  int64_t rows = 0, dim = 0;
  DType dtype = DType::kF32;  // of b and its gradient
  double scale = 1;           // 1 or 2
  const void* b = nullptr;    // T [rows, dim]
  RowLayout b_layout;
};
void beta_forward(const BetaParams& params, void* beta /* A [rows, dim] */);
void beta_backward(const BetaParams& params, const void* dbeta /* A [rows, dim] */,
                   void* db /* T [rows, dim] */);

// The oracle, in double for every dtype.
void gate_naive_forward(const GateParams& params, double* g);
void gate_naive_backward(const GateParams& params, const double* dg, double* da, double* dA_log,
                         double* ddt_bias);
void beta_naive_forward(const BetaParams& params, double* beta);
void beta_naive_backward(const BetaParams& params, const double* dbeta, double* db);

}  // namespace gdn
