// SPDX-License-Identifier: Apache-2.0
// Softmax attention of one query per head over the keys and values of a cache, as decoding has it:
//   o_h = sum_s softmax_s(scale q_h . k_s) v_s
// Bound by reading the cache, which is read once. Query heads h * H / HK ... share key head h. The
// cache is cut into segments of fixed length that are merged in order, so the result does not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"

namespace gdn {

// T = the type of dtype; sums are fp32, fp64 for fp64. Strides count elements; the last dimension
// is dense.
struct AttendStepParams {
  int64_t B = 0, S = 0;   // sequences, tokens of the cache (at least 1)
  int64_t H = 0, HK = 0;  // heads of queries and of keys; HK divides H
  int64_t K = 0, V = 0;   // sizes of a head's keys and values
  DType dtype = DType::kF32;
  double scale = 1;
  const void* q = nullptr;  // T [B, H, K]
  const void* k = nullptr;  // T [B, S, HK, K], tokens k_stride and sequences k_batch apart
  const void* v = nullptr;  // T [B, S, HK, V], tokens v_stride and sequences v_batch apart
  int64_t k_stride = 0, k_batch = 0, v_stride = 0, v_batch = 0;
};

// o: T [B, H, V]
void attend_step(const AttendStepParams& params, void* o);

// The oracle, in double for every dtype: o [B, H, V].
void attend_step_naive(const AttendStepParams& params, double* o);

}  // namespace gdn
