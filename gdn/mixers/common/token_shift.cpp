// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/token_shift.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "gdn/ops/common.h"

namespace gdn {
namespace {

// Packed sequences: one row, cut at the entries of `cu`.
at::Tensor shift_packed(const at::Tensor& x, const at::Tensor& before, const at::Tensor& cu,
                        StateAccess& state, const char* name) {
  const int64_t* ends = cu.const_data_ptr<int64_t>();
  std::vector<int64_t> sequences, firsts, lasts;  // of those that are not empty
  for (int64_t n = 0; n + 1 < cu.numel(); ++n) {
    if (ends[n] == ends[n + 1]) continue;
    sequences.push_back(n);
    firsts.push_back(ends[n]);
    lasts.push_back(ends[n + 1] - 1);
  }
  auto rows = [&](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(x.device());
  };
  const at::Tensor used = rows(sequences);
  const at::Tensor previous =
      at::cat({at::zeros_like(x.narrow(1, 0, 1)), x.narrow(1, 0, x.size(1) - 1)}, 1);
  const at::Tensor shifted =
      at::index_copy(previous, 1, rows(firsts), at::index_select(before, 0, used).unsqueeze(0));
  if (state.given()) {
    const at::Tensor last = at::index_select(x, 1, rows(lasts)).squeeze(0);
    state.write(name, at::index_copy(before, 0, used, last));
  }
  return shifted;
}

}  // namespace

at::Tensor token_shift(const at::Tensor& x, StateAccess& state, const char* name) {
  const int64_t T = x.size(1);
  if (T == 0) return x;
  const at::Tensor before = state.given()
                                ? state.read(name).to(x.scalar_type())
                                : zero_shift_state(state.num_sequences(), x.size(2), x.options());
  const at::Tensor cu = ops::host_cu_seqlens("token_shift", state.cu_seqlens(), T);
  if (cu.defined()) return shift_packed(x, before, cu, state, name);
  const at::Tensor shifted = at::cat({before.unsqueeze(1), x.narrow(1, 0, T - 1)}, 1);
  if (state.given()) state.write(name, x.select(1, T - 1));
  return shifted;
}

at::Tensor zero_shift_state(int64_t sequences, int64_t hidden_size,
                            const at::TensorOptions& options) {
  return at::zeros({sequences, hidden_size}, options);
}

}  // namespace gdn
