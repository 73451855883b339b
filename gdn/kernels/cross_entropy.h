// SPDX-License-Identifier: Apache-2.0
// Softmax cross-entropy of rows of logits against class indices:
//   logsumexp = m + log(sum exp(x - m)), m = max x;   loss = logsumexp - x[target];   0 for rows to
//   be ignored dx = (exp(x - logsumexp) - [target]) * dloss
// One pass for the maximum and one for the sum, and one more for the gradient, which may overwrite
// the logits. The softmax is never stored. Arithmetic is fp32 (double for double).
#pragma once

#include <cstdint>

#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn {

// T = the type of dtype; A = double where dtype is kF64, else float.
struct CrossEntropyParams {
  int64_t rows = 0, vocab = 0;
  DType dtype = DType::kF32;     // of the logits and their gradient
  const void* logits = nullptr;  // T [rows, vocab]
  RowLayout logits_layout;
  const int64_t* targets = nullptr;  // [rows], each in [0, vocab) or ignore_index
  int64_t ignore_index = -100;
};

// Throws gdn::Error naming the first target out of range.
void cross_entropy_forward(const CrossEntropyParams& params, void* loss /* A [rows] */,
                           void* logsumexp /* A [rows] */);

// dlogits is contiguous; it may be the logits themselves where those are contiguous.
void cross_entropy_backward(const CrossEntropyParams& params, const void* logsumexp /* A [rows] */,
                            const void* dloss /* A [rows] */, void* dlogits /* T [rows, vocab] */);

// The oracle, in double for every dtype.
void cross_entropy_naive_forward(const CrossEntropyParams& params, double* loss, double* logsumexp);
void cross_entropy_naive_backward(const CrossEntropyParams& params, const double* dloss,
                                  double* dlogits);

}  // namespace gdn
