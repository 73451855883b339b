// SPDX-License-Identifier: Apache-2.0
// One step's worth of work on the model: batches as tensors, loss and gradients, and what to say
// when numbers go bad.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gdn/model/causal_lm.h"
#include "gdn/text/dataset.h"
#include "gdn/train/optimizer.h"

namespace gdn {

struct TensorBatch {
  at::Tensor ids;         // int64 [B,T]
  at::Tensor targets;     // int64 [B,T], -100: not scored
  at::Tensor cu_seqlens;  // int64 [N+1] or undefined
  int64_t scored = 0;     // targets that are not -100

  ModelContext context() const;
};

TensorBatch to_tensors(const Batch& batch);

// Forward and backward over several batches whose gradients add up to those of the mean loss over
// all scored targets. Returns that loss.
double accumulate_gradients(CausalLM& model, const std::vector<TensorBatch>& batches);

// The first tensor that holds a NaN or an infinity, in the order of computation: parameters,
// activations of one of the batches, loss, gradients. "parameter model.norm.weight (3 of 192 values
// are not finite)", or "" when all are finite.
std::string first_bad_tensor(CausalLM& model, const NamedTensors& parameters,
                             const std::vector<TensorBatch>& batches);

}  // namespace gdn
