// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/gate.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "gdn/ops/gate.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Grads = std::tuple<Tensor, Tensor, Tensor>;  // of a, A_log, dt_bias

// What the kernel reads, kept alive while it runs.
struct Call {
  GateParams params;
  Tensor a, A_log, dt_bias;
};

// `per_channel`: the last two dimensions of a are [HV, K]; else the last one is HV.
Call prepare(const char* op, const Tensor& a, const Tensor& A_log, const optional<Tensor>& dt_bias,
             optional<double> lower_bound, bool per_channel) {
  GDN_CHECK(a.dim() >= (per_channel ? 2 : 1), "[", op, "] a must be ",
            per_channel ? "[..., HV, K]" : "[..., HV]", ", got ", shape_str(a));
  GDN_CHECK(!lower_bound.has_value() || *lower_bound < 0, "[", op,
            "] lower_bound must be negative, got ", lower_bound.value_or(0));
  Call call;
  GateParams& p = call.params;
  p.dtype = dtype_of(op, "a", a);
  p.heads = a.size(per_channel ? -2 : -1);
  p.channels = per_channel ? a.size(-1) : 1;
  GDN_CHECK(p.heads * p.channels >= 1, "[", op, "] a must have at least 1 head and channel, got ",
            shape_str(a));
  p.rows = a.numel() / (p.heads * p.channels);
  p.lower_bound = lower_bound;
  const Rows rows = rows_of(per_channel ? a.flatten(-2) : a);
  call.a = rows.tensor;
  p.a = call.a.const_data_ptr();
  p.a_layout = rows.layout;
  const at::ScalarType acc = acc_type(a.scalar_type());
  check_shape(op, "A_log", A_log, {p.heads}, "[HV]");
  call.A_log = A_log.to(acc).contiguous();
  p.A_log = call.A_log.const_data_ptr();
  if (has(dt_bias)) {
    check_shape(op, "dt_bias", *dt_bias, {p.heads * p.channels}, per_channel ? "[HV*K]" : "[HV]");
    call.dt_bias = dt_bias->to(acc).contiguous();
    p.dt_bias = call.dt_bias.const_data_ptr();
  }
  return call;
}

Tensor forward(const Call& call, const Tensor& a) {
  Tensor g = at::empty(a.sizes(), call.A_log.options());
  gate_forward(call.params, g.mutable_data_ptr());
  return g;
}

Grads backward(const char* op, const Call& call, const Tensor& dg, const Tensor& a,
               const Tensor& A_log, const optional<Tensor>& dt_bias) {
  check_shape(op, "dg", dg, a.sizes(), "of the shape of a");
  const Tensor dg_dense = dg.to(call.A_log.scalar_type()).contiguous();
  Tensor da = at::empty(a.sizes(), a.options()),
         dA_log = at::empty(A_log.sizes(), call.A_log.options());
  Tensor ddt_bias =
      at::empty(has(dt_bias) ? dt_bias->sizes() : at::IntArrayRef{0}, call.A_log.options());
  GateGrads grads;
  grads.dg = dg_dense.const_data_ptr();
  grads.da = da.mutable_data_ptr();
  grads.dA_log = dA_log.mutable_data_ptr();
  if (has(dt_bias)) grads.ddt_bias = ddt_bias.mutable_data_ptr();
  gate_backward(call.params, grads);
  if (has(dt_bias)) ddt_bias = ddt_bias.to(dt_bias->scalar_type());
  return {da, dA_log.to(A_log.scalar_type()), ddt_bias};
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

Tensor gdn_gate_cpu(const Tensor& a, const Tensor& A_log, const optional<Tensor>& dt_bias) {
  return forward(prepare("gdn_gate", a, A_log, dt_bias, {}, false), a);
}

Grads gdn_gate_bwd_cpu(const Tensor& dg, const Tensor& a, const Tensor& A_log,
                       const optional<Tensor>& dt_bias) {
  const char* op = "gdn_gate_bwd";
  return backward(op, prepare(op, a, A_log, dt_bias, {}, false), dg, a, A_log, dt_bias);
}

Tensor kda_gate_cpu(const Tensor& a, const Tensor& A_log, const optional<Tensor>& dt_bias,
                    optional<double> lower_bound) {
  return forward(prepare("kda_gate", a, A_log, dt_bias, lower_bound, true), a);
}

Grads kda_gate_bwd_cpu(const Tensor& dg, const Tensor& a, const Tensor& A_log,
                       const optional<Tensor>& dt_bias, optional<double> lower_bound) {
  const char* op = "kda_gate_bwd";
  return backward(op, prepare(op, a, A_log, dt_bias, lower_bound, true), dg, a, A_log, dt_bias);
}

BetaParams prepare_beta(const char* op, const Rows& rows, bool allow_neg_eigval) {
  BetaParams p;
  p.dtype = dtype_of(op, "b", rows.tensor);
  p.dim = rows.tensor.size(-1);
  p.rows = rows.tensor.numel() / std::max<int64_t>(1, p.dim);
  p.scale = allow_neg_eigval ? 2 : 1;
  p.b = rows.tensor.const_data_ptr();
  p.b_layout = rows.layout;
  return p;
}

Tensor beta_sigmoid_cpu(const Tensor& b, bool allow_neg_eigval) {
  const char* op = "beta_sigmoid";
  dtype_of(op, "b", b);
  Tensor beta = at::empty(b.sizes(), b.options().dtype(acc_type(b.scalar_type())));
  if (b.numel() == 0) return beta;
  const Rows rows = rows_of(b.dim() == 0 ? b.view(1) : b);
  beta_forward(prepare_beta(op, rows, allow_neg_eigval), beta.mutable_data_ptr());
  return beta;
}

Tensor beta_sigmoid_bwd_cpu(const Tensor& dbeta, const Tensor& b, bool allow_neg_eigval) {
  const char* op = "beta_sigmoid_bwd";
  check_shape(op, "dbeta", dbeta, b.sizes(), "of the shape of b");
  Tensor db = at::empty(b.sizes(), b.options());
  if (b.numel() == 0) return db;
  const Rows rows = rows_of(b.dim() == 0 ? b.view(1) : b);
  const Tensor dense = dbeta.to(acc_type(b.scalar_type())).contiguous();
  beta_backward(prepare_beta(op, rows, allow_neg_eigval), dense.const_data_ptr(),
                db.mutable_data_ptr());
  return db;
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Tensor acc_like(const Tensor& t) {
  return at::empty_symint(t.sym_sizes(), t.options().dtype(acc_type(t.scalar_type())));
}

Grads grads_like(const Tensor& a, const Tensor& A_log, const optional<Tensor>& dt_bias) {
  return {
      like(a), like(A_log),
      has(dt_bias) ? like(*dt_bias) : at::empty({0}, a.options().dtype(acc_type(a.scalar_type())))};
}

Tensor gdn_gate_meta(const Tensor& a, const Tensor&, const optional<Tensor>&) {
  return acc_like(a);
}
Grads gdn_gate_bwd_meta(const Tensor&, const Tensor& a, const Tensor& A_log,
                        const optional<Tensor>& dt_bias) {
  return grads_like(a, A_log, dt_bias);
}
Tensor kda_gate_meta(const Tensor& a, const Tensor&, const optional<Tensor>&, optional<double>) {
  return acc_like(a);
}
Grads kda_gate_bwd_meta(const Tensor&, const Tensor& a, const Tensor& A_log,
                        const optional<Tensor>& dt_bias, optional<double>) {
  return grads_like(a, A_log, dt_bias);
}
Tensor beta_sigmoid_meta(const Tensor& b, bool) { return acc_like(b); }
Tensor beta_sigmoid_bwd_meta(const Tensor&, const Tensor& b, bool) { return like(b); }

// --- Autograd
// --------------------------------------------------------------------------------------------------------

Grads gdn_gate_bwd(const Tensor& dg, const Tensor& a, const Tensor& A_log,
                   const optional<Tensor>& dt_bias) {
  static const auto op =
      typed_op<Grads(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&)>(
          "gdn::gdn_gate_bwd");
  return op.call(dg, a, A_log, dt_bias);
}

Grads kda_gate_bwd(const Tensor& dg, const Tensor& a, const Tensor& A_log,
                   const optional<Tensor>& dt_bias, optional<double> lower_bound) {
  static const auto op =
      typed_op<Grads(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                     optional<double>)>("gdn::kda_gate_bwd");
  return op.call(dg, a, A_log, dt_bias, lower_bound);
}

Tensor beta_sigmoid_bwd(const Tensor& dbeta, const Tensor& b, bool allow_neg_eigval) {
  static const auto op =
      typed_op<Tensor(const Tensor&, const Tensor&, bool)>("gdn::beta_sigmoid_bwd");
  return op.call(dbeta, b, allow_neg_eigval);
}

// dt_bias's gradient belongs to an input only where there is one.
Tensor only_if(const Tensor& input, const Tensor& gradient) {
  return input.defined() ? gradient : Tensor();
}

struct GdnGate : torch::autograd::Function<GdnGate> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& A_log,
                        const optional<Tensor>& dt_bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({a, A_log, dt_bias.value_or(Tensor())});
    return gdn_gate(a, A_log, dt_bias);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dg) {
    const variable_list saved = ctx->get_saved_variables();
    auto [da, dA_log, ddt_bias] = gdn_gate_bwd(dg[0], saved[0], saved[1], given(saved[2]));
    return {da, dA_log, only_if(saved[2], ddt_bias)};
  }
};

struct KdaGate : torch::autograd::Function<KdaGate> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& A_log,
                        const optional<Tensor>& dt_bias, optional<double> lower_bound) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({a, A_log, dt_bias.value_or(Tensor())});
    if (lower_bound.has_value()) ctx->saved_data["lower_bound"] = *lower_bound;
    return kda_gate(a, A_log, dt_bias, lower_bound);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dg) {
    const variable_list saved = ctx->get_saved_variables();
    optional<double> lower_bound;
    const auto found = ctx->saved_data.find("lower_bound");
    if (found != ctx->saved_data.end()) lower_bound = found->second.toDouble();
    auto [da, dA_log, ddt_bias] =
        kda_gate_bwd(dg[0], saved[0], saved[1], given(saved[2]), lower_bound);
    return {da, dA_log, only_if(saved[2], ddt_bias), Tensor()};
  }
};

struct BetaSigmoid : torch::autograd::Function<BetaSigmoid> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& b, bool allow_neg_eigval) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({b});
    ctx->saved_data["allow_neg_eigval"] = allow_neg_eigval;
    return beta_sigmoid(b, allow_neg_eigval);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dbeta) {
    const variable_list saved = ctx->get_saved_variables();
    return {beta_sigmoid_bwd(dbeta[0], saved[0], ctx->saved_data["allow_neg_eigval"].toBool()),
            Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("gdn_gate(Tensor a, Tensor A_log, Tensor? dt_bias=None) -> Tensor");
  m.def(
      "gdn_gate_bwd(Tensor dg, Tensor a, Tensor A_log, Tensor? dt_bias) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "kda_gate(Tensor a, Tensor A_log, Tensor? dt_bias=None, float? lower_bound=None) -> Tensor");
  m.def(
      "kda_gate_bwd(Tensor dg, Tensor a, Tensor A_log, Tensor? dt_bias, float? lower_bound) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("beta_sigmoid(Tensor b, bool allow_neg_eigval=False) -> Tensor");
  m.def("beta_sigmoid_bwd(Tensor dbeta, Tensor b, bool allow_neg_eigval) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("gdn_gate", gdn_gate_cpu);
  m.impl("gdn_gate_bwd", gdn_gate_bwd_cpu);
  m.impl("kda_gate", kda_gate_cpu);
  m.impl("kda_gate_bwd", kda_gate_bwd_cpu);
  m.impl("beta_sigmoid", beta_sigmoid_cpu);
  m.impl("beta_sigmoid_bwd", beta_sigmoid_bwd_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("gdn_gate", gdn_gate_meta);
  m.impl("gdn_gate_bwd", gdn_gate_bwd_meta);
  m.impl("kda_gate", kda_gate_meta);
  m.impl("kda_gate_bwd", kda_gate_bwd_meta);
  m.impl("beta_sigmoid", beta_sigmoid_meta);
  m.impl("beta_sigmoid_bwd", beta_sigmoid_bwd_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("gdn_gate", with_autograd<GdnGate, &gdn_gate>);
  m.impl("kda_gate", with_autograd<KdaGate, &kda_gate>);
  m.impl("beta_sigmoid", with_autograd<BetaSigmoid, &beta_sigmoid>);
  for (const char* op : {"gdn_gate_bwd", "kda_gate_bwd", "beta_sigmoid_bwd"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace gdn::ops
