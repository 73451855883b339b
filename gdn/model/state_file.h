// SPDX-License-Identifier: Apache-2.0
// The state of a model in a safetensors file: what it has read, to be carried into another run. The
// file names the configuration and the weights it belongs to.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "gdn/model/causal_lm.h"

namespace gdn {

struct SavedState {
  ModelState state;   // of one or more sequences
  at::Tensor logits;  // fp32 [N,vocab] after the last token
};

void save_state(const std::string& path, const CausalLM& model, const SavedState& saved);

// Throws an Error where the file is not the state of this model: another configuration, other
// weights, or entries that are missing, unexpected or of other shapes.
SavedState load_state(const std::string& path, const CausalLM& model);

}  // namespace gdn
