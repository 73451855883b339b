// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "gdn/kernels/norm.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

NormGate parse_activation(const char* op, std::string_view activation) {
  if (activation == "silu" || activation == "swish") return NormGate::kSilu;
  GDN_CHECK(activation == "sigmoid", "[", op,
            "] activation must be 'silu', 'swish' or 'sigmoid', got '", activation, "'");
  return NormGate::kSigmoid;
}

// What the kernel reads, kept alive while it runs.
struct Call {
  NormParams params;
  Rows x, gate;
  Tensor weight;
};

Call prepare(const char* op, NormKind kind, const Tensor& x, const Tensor* weight,
             const Tensor* gate, double eps, NormGate activation) {
  GDN_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[", op, "] x must be [..., D] with D >= 1, got ",
            shape_str(x));
  GDN_CHECK(eps >= 0, "[", op, "] eps must not be negative, got ", eps);
  Call call;
  NormParams& p = call.params;
  p.kind = kind;
  p.dtype = dtype_of(op, "x", x);
  p.dim = x.size(-1);
  p.rows = x.numel() / p.dim;
  p.eps = eps;
  p.activation = activation;
  call.x = rows_of(x);
  p.x = call.x.tensor.const_data_ptr();
  p.x_layout = call.x.layout;
  if (weight != nullptr) {
    check_shape(op, "weight", *weight, {p.dim}, "[D]");
    call.weight = weight->to(acc_type(x.scalar_type())).contiguous();
    p.weight = call.weight.const_data_ptr();
  }
  if (gate != nullptr) {
    check_shape(op, "gate", *gate, x.sizes(), "of the shape of x");
    check_same(op, "gate", *gate, "x", x);
    call.gate = rows_of(*gate);
    p.gate = call.gate.tensor.const_data_ptr();
    p.gate_layout = call.gate.layout;
  }
  return call;
}

Tensor forward(const Call& call, const Tensor& x) {
  Tensor y = at::empty(x.sizes(), x.options());
  norm_forward(call.params, y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const char* op, const Call& call, const Tensor& dy,
                                            const Tensor& x, const Tensor* weight,
                                            const std::optional<Tensor>& dsum = {}) {
  check_shape(op, "dy", dy, x.sizes(), "of the shape of x");
  const Rows dy_rows = rows_of(dy.to(x.scalar_type()));
  Rows dsum_rows;
  Tensor dx = at::empty(x.sizes(), x.options()), dgate, dweight;
  NormGrads grads;
  grads.dy = dy_rows.tensor.const_data_ptr();
  grads.dy_layout = dy_rows.layout;
  grads.dx = dx.mutable_data_ptr();
  if (has(dsum)) {
    check_shape(op, "dsum", *dsum, x.sizes(), "of the shape of sum");
    dsum_rows = rows_of(dsum->to(x.scalar_type()));
    grads.dsum = dsum_rows.tensor.const_data_ptr();
    grads.dsum_layout = dsum_rows.layout;
  }
  if (weight != nullptr) {
    dweight = at::empty(weight->sizes(), call.weight.options());
    grads.dweight = dweight.mutable_data_ptr();
  }
  if (call.params.gate != nullptr) {
    dgate = at::empty(x.sizes(), x.options());
    grads.dgate = dgate.mutable_data_ptr();
  }
  norm_backward(call.params, grads);
  if (weight != nullptr) dweight = dweight.to(weight->scalar_type());
  return {dx, dweight, dgate};
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

Tensor l2norm_cpu(const Tensor& x, double eps) {
  return forward(prepare("l2norm", NormKind::kL2, x, nullptr, nullptr, eps, {}), x);
}

Tensor l2norm_bwd_cpu(const Tensor& dy, const Tensor& x, double eps) {
  const Call call = prepare("l2norm_bwd", NormKind::kL2, x, nullptr, nullptr, eps, {});
  return std::get<0>(backward("l2norm_bwd", call, dy, x, nullptr));
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  return forward(prepare("rms_norm", NormKind::kRms, x, &weight, nullptr, eps, {}), x);
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            double eps) {
  const Call call = prepare("rms_norm_bwd", NormKind::kRms, x, &weight, nullptr, eps, {});
  auto [dx, dweight, dgate] = backward("rms_norm_bwd", call, dy, x, &weight);
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> add_rms_norm_cpu(const Tensor& x, const Tensor& y, const Tensor& weight,
                                            double scale, double eps) {
  const char* op = "add_rms_norm";
  Call call = prepare(op, NormKind::kRms, x, &weight, nullptr, eps, {});
  check_shape(op, "y", y, x.sizes(), "of the shape of x");
  check_same(op, "y", y, "x", x);
  const Rows add = rows_of(y);
  call.params.add = add.tensor.const_data_ptr();
  call.params.add_layout = add.layout;
  call.params.add_scale = scale;
  Tensor sum = at::empty(x.sizes(), x.options()), norm = at::empty(x.sizes(), x.options());
  norm_forward(call.params, norm.mutable_data_ptr(), sum.mutable_data_ptr());
  return {sum, norm};
}

std::tuple<Tensor, Tensor> add_rms_norm_bwd_cpu(const std::optional<Tensor>& dsum,
                                                const Tensor& dnorm, const Tensor& sum,
                                                const Tensor& weight, double eps) {
  const char* op = "add_rms_norm_bwd";
  const Call call = prepare(op, NormKind::kRms, sum, &weight, nullptr, eps, {});
  auto [dx, dweight, dgate] = backward(op, call, dnorm, sum, &weight, dsum);
  return {dx, dweight};
}

Tensor rms_norm_gated_cpu(const Tensor& x, const Tensor& weight, const Tensor& gate, double eps,
                          std::string_view activation) {
  const char* op = "rms_norm_gated";
  return forward(
      prepare(op, NormKind::kRms, x, &weight, &gate, eps, parse_activation(op, activation)), x);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd_cpu(const Tensor& dy, const Tensor& x,
                                                          const Tensor& weight, const Tensor& gate,
                                                          double eps, std::string_view activation) {
  const char* op = "rms_norm_gated_bwd";
  return backward(
      op, prepare(op, NormKind::kRms, x, &weight, &gate, eps, parse_activation(op, activation)), dy,
      x, &weight);
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Tensor l2norm_meta(const Tensor& x, double) { return like(x); }
Tensor l2norm_bwd_meta(const Tensor&, const Tensor& x, double) { return like(x); }
Tensor rms_norm_meta(const Tensor& x, const Tensor&, double) { return like(x); }
std::tuple<Tensor, Tensor> rms_norm_bwd_meta(const Tensor&, const Tensor& x, const Tensor& weight,
                                             double) {
  return {like(x), like(weight)};
}
std::tuple<Tensor, Tensor> add_rms_norm_meta(const Tensor& x, const Tensor&, const Tensor&, double,
                                             double) {
  return {like(x), like(x)};
}
std::tuple<Tensor, Tensor> add_rms_norm_bwd_meta(const std::optional<Tensor>&, const Tensor&,
                                                 const Tensor& sum, const Tensor& weight, double) {
  return {like(sum), like(weight)};
}
Tensor rms_norm_gated_meta(const Tensor& x, const Tensor&, const Tensor&, double,
                           std::string_view) {
  return like(x);
}
std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd_meta(const Tensor&, const Tensor& x,
                                                           const Tensor& weight, const Tensor& gate,
                                                           double, std::string_view) {
  return {like(x), like(weight), like(gate)};
}

// --- Autograd
// --------------------------------------------------------------------------------------------------------

Tensor l2norm_bwd(const Tensor& dy, const Tensor& x, double eps) {
  static const auto op = typed_op<Tensor(const Tensor&, const Tensor&, double)>("gdn::l2norm_bwd");
  return op.call(dy, x, eps);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        double eps) {
  static const auto op =
      typed_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>(
          "gdn::rms_norm_bwd");
  return op.call(dy, x, weight, eps);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd(const Tensor& dy, const Tensor& x,
                                                      const Tensor& weight, const Tensor& gate,
                                                      double eps, std::string_view activation) {
  static const auto op = typed_op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, std::string_view)>(
      "gdn::rms_norm_gated_bwd");
  return op.call(dy, x, weight, gate, eps, activation);
}

std::tuple<Tensor, Tensor> add_rms_norm_bwd(const std::optional<Tensor>& dsum, const Tensor& dnorm,
                                            const Tensor& sum, const Tensor& weight, double eps) {
  static const auto op = typed_op<decltype(add_rms_norm_bwd)>("gdn::add_rms_norm_bwd");
  return op.call(dsum, dnorm, sum, weight, eps);
}

struct L2Norm : torch::autograd::Function<L2Norm> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    ctx->saved_data["eps"] = eps;
    return l2norm(x, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    return {l2norm_bwd(dy[0], saved[0], ctx->saved_data["eps"].toDouble()), Tensor()};
  }
};

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return rms_norm(x, weight, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dx, dweight] = rms_norm_bwd(dy[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {dx, dweight, Tensor()};
  }
};

// The sum's gradient is added to the norm's in one pass.
struct AddRmsNorm : torch::autograd::Function<AddRmsNorm> {
  static constexpr bool is_traceable = true;
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y,
                               const Tensor& weight, double scale, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [sum, norm] = add_rms_norm(x, y, weight, scale, eps);
    ctx->save_for_backward({sum, weight});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return {sum, norm};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const double scale = ctx->saved_data["scale"].toDouble();
    Tensor dx = grads[0], dweight;
    if (grads[1].defined()) {
      std::tie(dx, dweight) = add_rms_norm_bwd(given(grads[0]), grads[1], saved[0], saved[1],
                                               ctx->saved_data["eps"].toDouble());
    }
    const Tensor dy = dx.defined() && scale != 1 ? dx.mul(scale) : dx;
    return {dx, dy, dweight, Tensor(), Tensor()};
  }
};

struct RmsNormGated : torch::autograd::Function<RmsNormGated> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& gate, double eps, std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, gate});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = std::string(activation);
    return rms_norm_gated(x, weight, gate, eps, activation);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dx, dweight, dgate] =
        rms_norm_gated_bwd(dy[0], saved[0], saved[1], saved[2], ctx->saved_data["eps"].toDouble(),
                           ctx->saved_data["activation"].toStringRef());
    return {dx, dweight, dgate, Tensor(), Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("l2norm(Tensor x, float eps=1e-06) -> Tensor");
  m.def("l2norm_bwd(Tensor dy, Tensor x, float eps) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-05) -> Tensor");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm(Tensor x, Tensor y, Tensor weight, float scale=1.0, float eps=1e-05) -> "
      "(Tensor sum, Tensor norm)");
  m.def(
      "add_rms_norm_bwd(Tensor? dsum, Tensor dnorm, Tensor sum, Tensor weight, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "rms_norm_gated(Tensor x, Tensor weight, Tensor gate, float eps=1e-05, str "
      "activation='silu') "
      "-> Tensor");
  m.def(
      "rms_norm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor gate, float eps, str "
      "activation) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("l2norm", l2norm_cpu);
  m.impl("l2norm_bwd", l2norm_bwd_cpu);
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_bwd", rms_norm_bwd_cpu);
  m.impl("add_rms_norm", add_rms_norm_cpu);
  m.impl("add_rms_norm_bwd", add_rms_norm_bwd_cpu);
  m.impl("rms_norm_gated", rms_norm_gated_cpu);
  m.impl("rms_norm_gated_bwd", rms_norm_gated_bwd_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("l2norm", l2norm_meta);
  m.impl("l2norm_bwd", l2norm_bwd_meta);
  m.impl("rms_norm", rms_norm_meta);
  m.impl("rms_norm_bwd", rms_norm_bwd_meta);
  m.impl("add_rms_norm", add_rms_norm_meta);
  m.impl("add_rms_norm_bwd", add_rms_norm_bwd_meta);
  m.impl("rms_norm_gated", rms_norm_gated_meta);
  m.impl("rms_norm_gated_bwd", rms_norm_gated_bwd_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("l2norm", with_autograd<L2Norm, &l2norm>);
  m.impl("rms_norm", with_autograd<RmsNorm, &rms_norm>);
  m.impl("add_rms_norm", with_autograd<AddRmsNorm, &add_rms_norm>);
  m.impl("rms_norm_gated", with_autograd<RmsNormGated, &rms_norm_gated>);
  for (const char* op : {"l2norm_bwd", "rms_norm_bwd", "add_rms_norm_bwd", "rms_norm_gated_bwd"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace gdn::ops
