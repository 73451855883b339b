// SPDX-License-Identifier: Apache-2.0
// Gradient checkpointing: keep a function's inputs instead of its activations, and run it again in
// backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace gdn {

using TensorsFn = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& inputs)>;

// fn(inputs), whose gradients with respect to `inputs` and `parameters` are computed by running fn
// once more in backward. `parameters` are the tensors that fn uses beside its inputs and that want
// gradients. fn must compute the same both times: no randomness, no state. The gradients are those
// of plain autograd to the bit. Gradients of gradients are not supported.
std::vector<at::Tensor> recompute_in_backward(const TensorsFn& fn,
                                              const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& parameters);

}  // namespace gdn
