// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/windows.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>

#include <algorithm>

namespace gdn {
namespace {

int64_t block_size(int64_t window) { return std::max<int64_t>(window, 64); }

}  // namespace

at::Tensor visible_keys(int64_t T, int64_t S, int64_t window, const at::Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const at::Tensor query = at::arange(S - T, S, options).unsqueeze(1);
  const at::Tensor key = at::arange(S, options).unsqueeze(0);
  const at::Tensor past = key <= query;
  return window > 0 ? past.logical_and(key > query - window) : past;
}

std::vector<at::Tensor> query_blocks(const at::Tensor& x, int64_t window) {
  return x.split(block_size(window), 1);
}

std::vector<at::Tensor> key_blocks(const at::Tensor& x, int64_t T, int64_t window) {
  const int64_t S = x.size(1), block = block_size(window);
  std::vector<int64_t> sizes = {S - T};  // what stands before the first block, then the blocks
  for (int64_t begin = 0; begin < T; begin += block) sizes.push_back(std::min(block, T - begin));
  const std::vector<at::Tensor> pieces = x.split_with_sizes(sizes, 1);
  std::vector<at::Tensor> seen;
  for (size_t i = 1; i < pieces.size(); ++i) {
    const at::Tensor& before = pieces[i - 1];  // at least as long as the window, or all there is
    const int64_t count = std::min(before.size(1), window - 1);
    const at::Tensor last = before.narrow(1, before.size(1) - count, count);
    seen.push_back(count == 0 ? pieces[i] : at::cat({last, pieces[i]}, 1));
  }
  return seen;
}

}  // namespace gdn
