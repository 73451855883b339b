// SPDX-License-Identifier: Apache-2.0
// What the ops' tests share: comparing an op, its outputs and its gradients with a composition of
// torch's own ops.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <vector>

#include "gdn/base/check.h"

namespace gdn::testing {

inline at::Tensor normal(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::kDouble).to(dtype);
}

// The text of the gdn::Error that `f` throws.
inline std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

inline void expect_near(const at::Tensor& actual, const at::Tensor& expected, double tol,
                        const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  const at::Tensor a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  if (e.numel() == 0) return;
  const double scale = e.abs().max().item<double>();
  EXPECT_LE((a - e).abs().max().item<double>(), tol * (1 + scale)) << what;
}

using Function = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

// `op` on inputs of `dtype` against `composition` in double on the same (rounded) inputs: outputs,
// and gradients of a random weighting of all outputs by all inputs.
inline void expect_same_function(const Function& op, const Function& composition,
                                 const std::vector<at::Tensor>& inputs, at::ScalarType dtype,
                                 const std::string& what) {
  const double tol = dtype == at::kDouble  ? 1e-11
                     : dtype == at::kFloat ? 2e-5
                     : dtype == at::kHalf  ? 4e-3
                                           : 2e-2;
  std::vector<at::Tensor> x, x64;
  for (const at::Tensor& t : inputs) {
    x.push_back(t.detach().to(dtype).requires_grad_());
    x64.push_back(x.back().detach().to(at::kDouble).requires_grad_());
  }
  const std::vector<at::Tensor> y = op(x), y64 = composition(x64);
  ASSERT_EQ(y.size(), y64.size()) << what;
  std::vector<at::Tensor> dy, dy64;
  for (size_t i = 0; i < y.size(); ++i) {
    expect_near(y[i], y64[i], tol, what + " output " + std::to_string(i));
    dy.push_back(normal(y[i].sizes()).to(y[i].scalar_type()));
    dy64.push_back(dy.back().to(at::kDouble));
  }
  const auto dx = torch::autograd::grad(y, x, dy), dx64 = torch::autograd::grad(y64, x64, dy64);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(dx[i].scalar_type(), dtype) << what;
    expect_near(dx[i], dx64[i], tol, what + " gradient " + std::to_string(i));
    EXPECT_GT(dx64[i].abs().max().item<double>(), 0)
        << what << ": a gradient of zeros tests nothing";
  }
}

inline const at::ScalarType kDtypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

}  // namespace gdn::testing
