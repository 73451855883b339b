// SPDX-License-Identifier: Apache-2.0
// The head of a language model and its loss in one: a few hundred rows of logits exist at a time.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn::ops {

// Mean over N of the cross-entropy in nats of softmax(hidden weight^T): hidden [N,D] in the compute
// dtype, weight [V,D] (cast to it), targets int64 [N], all in [0,V) -> a scalar in fp32 (fp64 for
// fp64). Where gradients are wanted they are computed along with the loss, chunk by chunk, and
// kept: [N,D] and [V,D] instead of [N,V]. Differentiable once.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets);

}  // namespace gdn::ops
