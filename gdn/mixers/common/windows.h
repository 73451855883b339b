// SPDX-License-Identifier: Apache-2.0
// Attention within a window by blocks of queries with the keys they can see, so that the cost grows
// with the tokens times the window. Blocks are cut once: the gradient of a slice is as long as what
// it was cut from, so that slicing block by block would cost a backward pass T^2 / block.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace gdn {

// Whether query i of T may see key j of S (bool [T,S]), the last query being the last key; with a
// window (not 0) it sees only `window` keys.
at::Tensor visible_keys(int64_t T, int64_t S, int64_t window, const at::Tensor& like);

// x [B,T,..] in blocks of at least `window` tokens.
std::vector<at::Tensor> query_blocks(const at::Tensor& x, int64_t window);

// For each block of the last T tokens the part of x [B,S,..] that it sees: the block itself and up
// to window - 1 tokens before it.
std::vector<at::Tensor> key_blocks(const at::Tensor& x, int64_t T, int64_t window);

}  // namespace gdn
