// SPDX-License-Identifier: Apache-2.0
// Products with weights, by whichever library or kernel is fastest here. Plain functions: what they
// call is differentiable or not as it is.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <vector>

namespace gdn::ops {

// Which library multiplies fp32 matrices of many rows. torch's own choice is MKL, which on AMD's
// CPUs runs its AVX2 code: there oneDNN's AVX-512 code is faster (docs/performance.md). GDN_GEMM
// overrides: "torch" or "onednn".
enum class GemmBackend : uint8_t { kTorch, kOneDnn };
GemmBackend gemm_backend();
void set_gemm_backend(GemmBackend backend);  // for tests

// y = x weight^T + bias, all of one dtype: x [..., in], weight [out, in], bias [out] -> [..., out].
// Differentiable, also twice.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias = {});

struct Projection {
  at::Tensor weight;  // [out, in]
  at::Tensor bias;    // [out] or undefined
};

// Whether few_rows takes this: no gradients, fp32 or bf16 on the CPU, at most kFewRows rows.
inline constexpr int64_t kFewRows = 4;
bool is_few_rows(const at::Tensor& x);

// Each projection of the same few rows x [..., in], in one pass over the weights, which must be
// contiguous and of x's dtype.
std::vector<at::Tensor> few_rows(const at::Tensor& x, std::span<const Projection> projections);

}  // namespace gdn::ops
