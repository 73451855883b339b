// SPDX-License-Identifier: Apache-2.0
// Where a call's tokens stand in their sequences, and rotary positions (arXiv 2104.09864).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "gdn/mixers/common/state_access.h"

namespace gdn {

// Tokens of each of the call's sequences, int64 [N]; x of the call is [B,T,D].
at::Tensor sequence_lengths(const StateAccess& state, int64_t T);
// The position of each token in its sequence, int64 [B,T], of whose tokens `before`, int64 [N],
// came before this call.
at::Tensor token_positions(const StateAccess& state, const at::Tensor& before, int64_t T);

// x [B,T,H,D], pair (x_i, x_{i+R/2}) of the first R = rotary_dim (default D) dimensions of the
// token at position p turned by the angle p * theta^(-2i/R), the others as they are. positions
// int64, [T] (the same for each sequence) or [B,T]. With `naive` by the definition, in double; else
// by gdn::rotary. theta 0: x itself.
at::Tensor rotated(const at::Tensor& x, const at::Tensor& positions, double theta, bool naive,
                   std::optional<int64_t> rotary_dim = {});
// The first token of each sequence is at `position`.
at::Tensor rotated(const at::Tensor& x, int64_t position, double theta, bool naive,
                   std::optional<int64_t> rotary_dim = {});

}  // namespace gdn
