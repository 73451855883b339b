// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mamba/op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "gdn/mixers/mamba/kernel.h"
#include "gdn/ops/in_place.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
// Of x, dt, A, B, C, D, dt_bias, initial_state.
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the kernel reads, kept alive while it runs.
struct Call {
  SelectiveScanParams params;
  Tensor x, dt, A, B, C, D, dt_bias, initial, cu_seqlens;
};

// The parts that whole sequences and the step have in common.
Call prepare(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
             const Tensor& C, const optional<Tensor>& D, const optional<Tensor>& dt_bias,
             bool softplus, bool signed_transition) {
  check_dim(op, "A", A, 2, "[C,S]");
  Call call;
  SelectiveScanParams& p = call.params;
  p.dtype = dtype_of(op, "x", x);
  p.channels = x.size(-1);
  p.states = A.size(1);
  p.softplus = softplus;
  p.signed_transition = signed_transition;
  GDN_CHECK(p.channels >= 1 && p.states >= 1, "[", op,
            "] x must have at least 1 channel and A [C,S] at least 1 state, got ", shape_str(x),
            " and ", shape_str(A));
  std::vector<int64_t> states(x.sizes().begin(), x.sizes().end());
  states.back() = p.states;
  check_shape(op, "dt", dt, x.sizes(), "the shape of x");
  check_shape(op, "A", A, {p.channels, p.states}, "[C,S]");
  check_shape(op, "B", B, states, "[..,S]");
  check_shape(op, "C", C, states, "[..,S]");
  check_same(op, "dt", dt, "x", x);
  check_same(op, "B", B, "x", x);
  check_same(op, "C", C, "x", x);
  const at::ScalarType acc = acc_type(x.scalar_type());
  call.x = x.contiguous();
  call.dt = dt.contiguous();
  call.A = A.to(acc).contiguous();
  call.B = B.contiguous();
  call.C = C.contiguous();
  p.x = call.x.const_data_ptr();
  p.dt = call.dt.const_data_ptr();
  p.A = call.A.const_data_ptr();
  p.B = call.B.const_data_ptr();
  p.C = call.C.const_data_ptr();
  const auto channel = [&](const char* name, const optional<Tensor>& from, Tensor& to) {
    if (!has(from)) return static_cast<const void*>(nullptr);
    check_shape(op, name, *from, {p.channels}, "[C]");
    to = from->to(acc).contiguous();
    return to.const_data_ptr();
  };
  p.D = channel("D", D, call.D);
  p.dt_bias = channel("dt_bias", dt_bias, call.dt_bias);
  return call;
}

Call prepare_sequences(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A,
                       const Tensor& B, const Tensor& C, const optional<Tensor>& D,
                       const optional<Tensor>& dt_bias, const optional<Tensor>& initial_state,
                       const optional<Tensor>& cu_seqlens, bool softplus, bool signed_transition) {
  check_dim(op, "x", x, 3, "[B,T,C]");
  Call call = prepare(op, x, dt, A, B, C, D, dt_bias, softplus, signed_transition);
  SelectiveScanParams& p = call.params;
  p.num_sequences = x.size(0);
  p.total_tokens = x.size(0) * x.size(1);
  if (has(cu_seqlens)) {
    GDN_CHECK(x.size(0) == 1, "[", op, "] with cu_seqlens the batch size of x must be 1, got ",
              x.size(0));
    call.cu_seqlens = host_cu_seqlens(op, cu_seqlens, p.total_tokens);
    p.num_sequences = call.cu_seqlens.numel() - 1;
    p.cu_seqlens = data_or_null(call.cu_seqlens);
  }
  if (has(initial_state)) {
    check_shape(op, "initial_state", *initial_state, {p.num_sequences, p.channels, p.states},
                "[N,C,S]");
    call.initial = initial_state->to(acc_type(x.scalar_type())).contiguous();
    p.initial = call.initial.const_data_ptr();
  }
  return call;
}

at::TensorOptions acc_options(const Tensor& x) {
  return x.options().dtype(acc_type(x.scalar_type()));
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

Outputs selective_scan_cpu(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                           const Tensor& C, const optional<Tensor>& D,
                           const optional<Tensor>& dt_bias, const optional<Tensor>& initial_state,
                           const optional<Tensor>& cu_seqlens, bool output_final_state,
                           bool softplus, bool signed_transition, bool save) {
  const Call call = prepare_sequences("selective_scan", x, dt, A, B, C, D, dt_bias, initial_state,
                                      cu_seqlens, softplus, signed_transition);
  const SelectiveScanParams& p = call.params;
  const at::TensorOptions acc = acc_options(x);
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor final_state = output_final_state ? at::empty({p.num_sequences, p.channels, p.states}, acc)
                                          : at::empty({0}, acc);
  Tensor saved =
      save ? at::empty({selective_scan_chunks(p), p.states, p.channels}, acc) : at::empty({0}, acc);
  selective_scan_forward(p, y.mutable_data_ptr(),
                         output_final_state ? final_state.mutable_data_ptr() : nullptr,
                         save ? saved.mutable_data_ptr() : nullptr);
  return {y, final_state, saved};
}

Grads selective_scan_bwd_cpu(const optional<Tensor>& dy, const optional<Tensor>& d_final_state,
                             const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                             const Tensor& C, const optional<Tensor>& D,
                             const optional<Tensor>& dt_bias, const optional<Tensor>& initial_state,
                             const optional<Tensor>& cu_seqlens, const Tensor& saved, bool softplus,
                             bool signed_transition) {
  const char* op = "selective_scan_bwd";
  const Call call = prepare_sequences(op, x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens,
                                      softplus, signed_transition);
  const SelectiveScanParams& p = call.params;
  check_shape(op, "saved", saved, {selective_scan_chunks(p), p.states, p.channels},
              "[T/chunk+N,S,C]");
  const at::TensorOptions acc = acc_options(x);
  const optional<Tensor> dy_dense = contiguous_as(dy, x.scalar_type());
  const optional<Tensor> d_final = contiguous_as(d_final_state, acc_type(x.scalar_type()));
  const Tensor kept = saved.contiguous();
  SelectiveScanGrads g;
  g.dy = data_or_null(dy_dense);
  g.d_final = data_or_null(d_final);
  const auto make = [](void*& pointer, at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor t = at::empty(sizes, options);
    pointer = t.mutable_data_ptr();
    return t;
  };
  const auto sizes_of = [](const optional<Tensor>& t) {
    return has(t) ? t->sizes() : at::IntArrayRef{0};
  };
  Tensor dx = make(g.dx, x.sizes(), x.options()), ddt = make(g.ddt, x.sizes(), x.options());
  Tensor dA = make(g.dA, A.sizes(), acc);
  Tensor dB = make(g.dB, B.sizes(), x.options()), dC = make(g.dC, C.sizes(), x.options());
  Tensor dD = make(g.dD, sizes_of(D), acc), ddt_bias = make(g.ddt_bias, sizes_of(dt_bias), acc);
  Tensor d_initial = make(g.d_initial, sizes_of(initial_state), acc);
  if (!has(D)) g.dD = nullptr;
  if (!has(dt_bias)) g.ddt_bias = nullptr;
  if (!has(initial_state)) g.d_initial = nullptr;
  selective_scan_backward(p, kept.const_data_ptr(), g);
  const auto as = [](const Tensor& grad, const optional<Tensor>& input) {
    return has(input) ? grad.to(input->scalar_type()) : grad;
  };
  return {
      dx, ddt, as(dA, A), dB, dC, as(dD, D), as(ddt_bias, dt_bias), as(d_initial, initial_state)};
}

Tensor selective_scan_step_cpu(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                               const Tensor& C, const optional<Tensor>& D,
                               const optional<Tensor>& dt_bias, Tensor& state,
                               const optional<Tensor>& slots, bool softplus,
                               bool signed_transition) {
  const char* op = "selective_scan_step_";
  check_dim(op, "x", x, 2, "[N,C]");
  Call call = prepare(op, x, dt, A, B, C, D, dt_bias, softplus, signed_transition);
  SelectiveScanParams& p = call.params;
  p.num_sequences = p.total_tokens = x.size(0);
  check_shape(op, "state", state, {-1, p.channels, p.states}, "[num_slots,C,S]");
  GDN_CHECK(state.scalar_type() == acc_type(x.scalar_type()), "[", op, "] state must be ",
            c10::toString(acc_type(x.scalar_type())), ", got ", c10::toString(state.scalar_type()));
  GDN_CHECK(state.is_contiguous(), "[", op,
            "] state is updated in place and must be contiguous, got strides ", state.strides());
  GDN_CHECK(has(slots) || p.num_sequences <= state.size(0), "[", op,
            "] without slots state must hold ", p.num_sequences, " sequences, got ",
            shape_str(state));
  const Tensor host = host_slots(op, slots, p.num_sequences, state.size(0));
  Tensor y = at::empty(x.sizes(), x.options());
  selective_scan_step(p, state.mutable_data_ptr(), state.size(0), data_or_null(host),
                      y.mutable_data_ptr());
  return y;
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Outputs selective_scan_meta(const Tensor& x, const Tensor&, const Tensor& A, const Tensor&,
                            const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                            const optional<Tensor>&, const optional<Tensor>& cu_seqlens,
                            bool output_final_state, bool, bool, bool save) {
  check_dim("selective_scan", "x", x, 3, "[B,T,C]");
  check_dim("selective_scan", "A", A, 2, "[C,S]");
  const c10::SymInt n = has(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0);
  const c10::SymInt chunks = x.sym_size(0) * x.sym_size(1) / kScanChunk + n;
  const auto acc = acc_options(x);
  Tensor final_state = output_final_state ? at::empty_symint({n, x.sym_size(2), A.sym_size(1)}, acc)
                                          : at::empty({0}, acc);
  Tensor saved =
      save ? at::empty_symint({chunks, A.sym_size(1), x.sym_size(2)}, acc) : at::empty({0}, acc);
  return {like(x), final_state, saved};
}

Grads selective_scan_bwd_meta(const optional<Tensor>&, const optional<Tensor>&, const Tensor& x,
                              const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                              const optional<Tensor>& D, const optional<Tensor>& dt_bias,
                              const optional<Tensor>& initial_state, const optional<Tensor>&,
                              const Tensor&, bool, bool) {
  const auto or_empty = [&](const optional<Tensor>& t) {
    return has(t) ? like(*t) : at::empty({0}, acc_options(x));
  };
  return {like(x), like(dt),    like(A),           like(B),
          like(C), or_empty(D), or_empty(dt_bias), or_empty(initial_state)};
}

Tensor selective_scan_step_meta(const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                                Tensor&, const optional<Tensor>&, bool, bool) {
  return like(x);
}

// --- Autograd
// --------------------------------------------------------------------------------------------------------

struct SelectiveScan : torch::autograd::Function<SelectiveScan> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& dt,
                               const Tensor& A, const Tensor& B, const Tensor& C,
                               const optional<Tensor>& D, const optional<Tensor>& dt_bias,
                               const optional<Tensor>& initial_state,
                               const optional<Tensor>& cu_seqlens, bool output_final_state,
                               bool softplus, bool signed_transition) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, final_state, saved] =
        selective_scan(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, output_final_state,
                       softplus, signed_transition, /*save=*/true);
    const auto value = [](const optional<Tensor>& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward(
        {x, dt, A, B, C, value(D), value(dt_bias), value(initial_state), value(cu_seqlens), saved});
    ctx->saved_data["softplus"] = softplus;
    ctx->saved_data["signed_transition"] = signed_transition;
    ctx->set_materialize_grads(false);
    if (!output_final_state) ctx->mark_non_differentiable({final_state});
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op =
        typed_op<Grads(const optional<Tensor>&, const optional<Tensor>&, const Tensor&,
                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       const optional<Tensor>&, const optional<Tensor>&, const optional<Tensor>&,
                       const optional<Tensor>&, const Tensor&, bool, bool)>(
            "gdn::selective_scan_bwd");
    variable_list out(12);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const variable_list s = ctx->get_saved_variables();
    std::tie(out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]) =
        op.call(given(grads[0]), given(grads[1]), s[0], s[1], s[2], s[3], s[4], given(s[5]),
                given(s[6]), given(s[7]), given(s[8]), s[9], ctx->saved_data["softplus"].toBool(),
                ctx->saved_data["signed_transition"].toBool());
    for (size_t i = 5; i < 8; ++i)
      if (!s[i].defined()) out[i] = Tensor();
    return out;
  }
};

Outputs selective_scan_autograd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                const Tensor& C, const optional<Tensor>& D,
                                const optional<Tensor>& dt_bias,
                                const optional<Tensor>& initial_state,
                                const optional<Tensor>& cu_seqlens, bool output_final_state,
                                bool softplus, bool signed_transition, bool save) {
  if (wants_grad(x, dt, A, B, C, D, dt_bias, initial_state)) {
    const variable_list out =
        SelectiveScan::apply(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens,
                             output_final_state, softplus, signed_transition);
    return {out[0], out[1], at::empty({0}, acc_options(x))};  // what was saved is the graph's
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return selective_scan(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, output_final_state,
                        softplus, signed_transition, save);
}

Tensor selective_scan_step_autograd(const Tensor& x, const Tensor& dt, const Tensor& A,
                                    const Tensor& B, const Tensor& C, const optional<Tensor>& D,
                                    const optional<Tensor>& dt_bias, Tensor& state,
                                    const optional<Tensor>& slots, bool softplus,
                                    bool signed_transition) {
  return step_in_place("selective_scan_step_", "selective_scan with initial_state",
                       wants_grad(x, dt, A, B, C, D, dt_bias, state), {&state}, [&] {
                         return selective_scan_step_(x, dt, A, B, C, D, dt_bias, state, slots,
                                                     softplus, signed_transition);
                       });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? dt_bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
      "bool output_final_state=False, bool softplus=True, bool signed_transition=False, "
      "bool save=False) -> (Tensor y, Tensor final_state, Tensor saved)");
  m.def(
      "selective_scan_bwd(Tensor? dy, Tensor? d_final_state, Tensor x, Tensor dt, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor saved, bool softplus, bool signed_transition) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_step_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? dt_bias, Tensor(a!) state, Tensor? slots=None, bool softplus=True, "
      "bool signed_transition=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("selective_scan", selective_scan_cpu);
  m.impl("selective_scan_bwd", selective_scan_bwd_cpu);
  m.impl("selective_scan_step_", selective_scan_step_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("selective_scan", selective_scan_meta);
  m.impl("selective_scan_bwd", selective_scan_bwd_meta);
  m.impl("selective_scan_step_", selective_scan_step_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("selective_scan", selective_scan_autograd);
  m.impl("selective_scan_step_", selective_scan_step_autograd);
  m.impl("selective_scan_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
