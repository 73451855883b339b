// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "gdn/base/check.h"
#include "gdn/kernels/matvec.h"
#include "gdn/ops/common.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOneDnnLinear = "mkldnn::_linear_pointwise";

bool has_onednn() {
  return c10::Dispatcher::singleton().findSchema({kOneDnnLinear, ""}).has_value();
}

GemmBackend choose_backend() {
  const char* given = std::getenv("GDN_GEMM");
  const std::string_view wish = given == nullptr ? "" : given;
  if (!wish.empty() && wish != "auto") {
    if (wish != "torch" && wish != "onednn") {
      throw UsageError(str_cat("GDN_GEMM must be auto, torch or onednn, got \"", wish, "\""));
    }
    if (wish == "onednn" && !has_onednn()) {
      throw UsageError("GDN_GEMM=onednn needs a torch that was built with oneDNN");
    }
    return wish == "onednn" ? GemmBackend::kOneDnn : GemmBackend::kTorch;
  }
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") && has_onednn()) {
    return GemmBackend::kOneDnn;
  }
#endif
  return GemmBackend::kTorch;
}

std::atomic<GemmBackend>& backend() {
  static std::atomic<GemmBackend> chosen{choose_backend()};
  return chosen;
}

// x [M,in] weight [out,in]^T by oneDNN, below autograd.
Tensor onednn_product(const Tensor& x, const Tensor& weight) {
  static const auto op =
      typed_op<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                      c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>(
          kOneDnnLinear);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, weight, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor product(const Tensor& x, const Tensor& weight);

struct OneDnnProduct : torch::autograd::Function<OneDnnProduct> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    ctx->save_for_backward({x, weight});
    return onednn_product(x, weight);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor dy = grads[0].contiguous();
    Tensor dx, dweight;
    // Turning the weight costs little beside the product; for its own gradient MKL is as fast, and
    // needs nothing turned.
    if (ctx->needs_input_grad(0)) dx = product(dy, saved[1].t().contiguous());
    if (ctx->needs_input_grad(1)) dweight = at::mm(dy.t(), saved[0]);
    return {dx, dweight};
  }
};

Tensor product(const Tensor& x, const Tensor& weight) {
  return wants_grad(x, weight) ? OneDnnProduct::apply(x, weight) : onednn_product(x, weight);
}

}  // namespace

GemmBackend gemm_backend() { return backend().load(); }

void set_gemm_backend(GemmBackend wanted) { backend().store(wanted); }

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool onednn = x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
                      x.device().is_cpu() && x.dim() >= 2 && x.numel() > 0 &&
                      gemm_backend() == GemmBackend::kOneDnn;
  if (!onednn) return at::linear(x, weight, bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  GDN_CHECK(weight.dim() == 2 && weight.size(1) == sizes.back(),
            "[linear] weight must be [out,in] = [any, ", sizes.back(), "], got ",
            shape_str(weight));
  sizes.back() = weight.size(0);
  const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  const Tensor y = product(rows, weight.contiguous()).view(sizes);
  return has(bias) ? y.add(*bias) : y;
}

bool is_few_rows(const Tensor& x) {
  return !c10::GradMode::is_enabled() && x.device().is_cpu() && x.dim() >= 1 &&
         x.numel() <= kFewRows * x.size(-1) && x.numel() > 0 &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

std::vector<Tensor> few_rows(const Tensor& x, std::span<const Projection> projections) {
  RECORD_FUNCTION("gdn::linear_few_rows", c10::ArrayRef<const c10::IValue>());
  const Tensor rows = x.contiguous();
  MatvecParams p;
  p.in = p.x_stride = rows.size(-1);
  p.rows = rows.numel() / p.in;
  p.dtype = dtype_of("few_rows", "x", rows);
  p.x = rows.const_data_ptr();
  std::vector<int64_t> sizes = x.sizes().vec();
  std::vector<Tensor> results;
  std::vector<MatvecWeight> weights;
  for (const auto& [weight, bias] : projections) {
    check_shape("few_rows", "weight", weight, {-1, p.in}, "[out,in]");
    check_same("few_rows", "weight", weight, "x", x);
    GDN_CHECK(weight.is_contiguous(), "[few_rows] weight must be contiguous, got strides ",
              weight.strides());
    sizes.back() = weight.size(0);
    results.push_back(at::empty(sizes, x.options()));
    weights.push_back({weight.const_data_ptr(), bias.defined() ? bias.const_data_ptr() : nullptr,
                       weight.size(0), results.back().mutable_data_ptr(), weight.size(0)});
  }
  p.weights = weights;
  matvec(p);
  return results;
}

}  // namespace gdn::ops
