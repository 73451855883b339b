// SPDX-License-Identifier: Apache-2.0
// RWKV's token shift: each token beside the one before it in its sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include "gdn/mixers/common/state_access.h"

namespace gdn {

// x [B,T,D] -> [B,T,D] with x_{t-1} at t; before a sequence's first token stands the entry `name`
// [N,D] of the call's state, or zero. Leaves each sequence's last token in that entry.
at::Tensor token_shift(const at::Tensor& x, StateAccess& state, const char* name);

// [N,D] of zeros, the entry of sequences that have seen nothing.
at::Tensor zero_shift_state(int64_t sequences, int64_t hidden_size,
                            const at::TensorOptions& options);

}  // namespace gdn
