// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/positions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/pow.h>

#include "gdn/ops/common.h"
#include "gdn/ops/rope.h"

namespace gdn {
namespace {

at::Tensor by_definition(const at::Tensor& x, const at::Tensor& positions, double theta,
                         int64_t R) {
  const int64_t D = x.size(3), half = R / 2;
  const at::Tensor p = positions.to(at::kDouble);
  const at::Tensor exponents = at::arange(half, p.options()) * (-2.0 / static_cast<double>(R));
  const at::Tensor angles = (p.unsqueeze(-1) * at::pow(theta, exponents)).unsqueeze(-2);
  const at::Tensor cos = angles.cos(), sin = angles.sin();  // [T,1,R/2] or [B,T,1,R/2]
  const at::Tensor low = x.narrow(3, 0, half), high = x.narrow(3, half, half);
  return at::cat({low * cos - high * sin, high * cos + low * sin, x.narrow(3, R, D - R)}, 3)
      .to(x.scalar_type());
}

}  // namespace

at::Tensor sequence_lengths(const StateAccess& state, int64_t T) {
  if (!state.cu_seqlens().defined()) return at::full({state.num_sequences()}, T, at::kLong);
  const at::Tensor cu = ops::host_cu_seqlens("sequence_lengths", state.cu_seqlens(), T);
  return cu.slice(0, 1) - cu.slice(0, 0, -1);
}

at::Tensor token_positions(const StateAccess& state, const at::Tensor& before, int64_t T) {
  const at::Tensor tokens = at::arange(T, at::kLong);
  if (!state.cu_seqlens().defined()) return before.unsqueeze(1) + tokens;
  const at::Tensor lengths = sequence_lengths(state, T);
  const at::Tensor starts = lengths.cumsum(0) - lengths;
  return (tokens + (before - starts).repeat_interleave(lengths)).unsqueeze(0);
}

at::Tensor rotated(const at::Tensor& x, const at::Tensor& positions, double theta, bool naive,
                   std::optional<int64_t> rotary_dim) {
  if (theta == 0) return x;
  return naive ? by_definition(x, positions, theta, rotary_dim.value_or(x.size(3)))
               : ops::rotary(x, positions, theta, rotary_dim);
}

at::Tensor rotated(const at::Tensor& x, int64_t position, double theta, bool naive,
                   std::optional<int64_t> rotary_dim) {
  return rotated(x, at::arange(position, position + x.size(1), x.options().dtype(at::kLong)), theta,
                 naive, rotary_dim);
}

}  // namespace gdn
