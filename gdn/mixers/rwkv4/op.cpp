// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/rwkv4/op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gdn/mixers/rwkv4/kernel.h"
#include "gdn/ops/in_place.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of w, u, k, v, initial_state

// What the kernel reads, kept alive while it runs.
struct WkvCall {
  WkvParams params;
  Tensor w, u, k, v, initial, cu_seqlens;
};

WkvCall prepare_wkv(const char* op, const Tensor& w, const Tensor& u, const Tensor& k,
                    const Tensor& v) {
  WkvCall call;
  WkvParams& p = call.params;
  p.dtype = dtype_of(op, "k", k);
  p.channels = k.size(-1);
  GDN_CHECK(p.channels >= 1, "[", op, "] k must have at least 1 channel, got ", shape_str(k));
  check_shape(op, "v", v, k.sizes(), "the shape of k");
  check_same(op, "v", v, "k", k);
  check_shape(op, "w", w, {p.channels}, "[C]");
  check_shape(op, "u", u, {p.channels}, "[C]");
  const at::ScalarType acc = acc_type(k.scalar_type());
  call.w = w.to(acc).contiguous();
  call.u = u.to(acc).contiguous();
  call.k = k.contiguous();
  call.v = v.contiguous();
  p.w = call.w.const_data_ptr();
  p.u = call.u.const_data_ptr();
  p.k = call.k.const_data_ptr();
  p.v = call.v.const_data_ptr();
  return call;
}

WkvCall prepare_wkv_sequences(const char* op, const Tensor& w, const Tensor& u, const Tensor& k,
                              const Tensor& v, const optional<Tensor>& initial_state,
                              const optional<Tensor>& cu_seqlens) {
  check_dim(op, "k", k, 3, "[B,T,C]");
  WkvCall call = prepare_wkv(op, w, u, k, v);
  WkvParams& p = call.params;
  p.num_sequences = k.size(0);
  p.total_tokens = k.size(0) * k.size(1);
  if (has(cu_seqlens)) {
    GDN_CHECK(k.size(0) == 1, "[", op, "] with cu_seqlens the batch size of k must be 1, got ",
              k.size(0));
    call.cu_seqlens = host_cu_seqlens(op, cu_seqlens, p.total_tokens);
    p.num_sequences = call.cu_seqlens.numel() - 1;
    p.cu_seqlens = data_or_null(call.cu_seqlens);
  }
  if (has(initial_state)) {
    check_shape(op, "initial_state", *initial_state, {p.num_sequences, 3, p.channels}, "[N,3,C]");
    call.initial = initial_state->to(acc_type(k.scalar_type())).contiguous();
    p.initial = call.initial.const_data_ptr();
  }
  return call;
}

at::TensorOptions wkv_acc_options(const Tensor& k) {
  return k.options().dtype(acc_type(k.scalar_type()));
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

Outputs wkv_cpu(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                const optional<Tensor>& initial_state, const optional<Tensor>& cu_seqlens,
                bool output_final_state, bool save) {
  const WkvCall call = prepare_wkv_sequences("wkv", w, u, k, v, initial_state, cu_seqlens);
  const WkvParams& p = call.params;
  const at::TensorOptions acc = wkv_acc_options(k);
  Tensor y = at::empty(k.sizes(), k.options());
  Tensor final_state =
      output_final_state ? at::empty({p.num_sequences, 3, p.channels}, acc) : at::empty({0}, acc);
  Tensor saved = save ? at::empty({wkv_chunks(p), 3, p.channels}, acc) : at::empty({0}, acc);
  wkv_forward(p, y.mutable_data_ptr(),
              output_final_state ? final_state.mutable_data_ptr() : nullptr,
              save ? saved.mutable_data_ptr() : nullptr);
  return {y, final_state, saved};
}

Grads wkv_bwd_cpu(const optional<Tensor>& dy, const optional<Tensor>& d_final_state,
                  const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                  const optional<Tensor>& initial_state, const optional<Tensor>& cu_seqlens,
                  const Tensor& saved) {
  const char* op = "wkv_bwd";
  const WkvCall call = prepare_wkv_sequences(op, w, u, k, v, initial_state, cu_seqlens);
  const WkvParams& p = call.params;
  check_shape(op, "saved", saved, {wkv_chunks(p), 3, p.channels}, "[T/chunk+N,3,C]");
  const at::TensorOptions acc = wkv_acc_options(k);
  const optional<Tensor> dy_dense = contiguous_as(dy, k.scalar_type());
  const optional<Tensor> d_final = contiguous_as(d_final_state, acc_type(k.scalar_type()));
  const Tensor kept = saved.contiguous();
  Tensor dw = at::empty(w.sizes(), acc), du = at::empty(u.sizes(), acc);
  Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(k.sizes(), k.options());
  Tensor d_initial =
      at::empty(has(initial_state) ? initial_state->sizes() : at::IntArrayRef{0}, acc);
  WkvGrads g;
  g.dy = data_or_null(dy_dense);
  g.d_final = data_or_null(d_final);
  g.dw = dw.mutable_data_ptr();
  g.du = du.mutable_data_ptr();
  g.dk = dk.mutable_data_ptr();
  g.dv = dv.mutable_data_ptr();
  if (has(initial_state)) g.d_initial = d_initial.mutable_data_ptr();
  wkv_backward(p, kept.const_data_ptr(), g);
  if (has(initial_state)) d_initial = d_initial.to(initial_state->scalar_type());
  return {dw.to(w.scalar_type()), du.to(u.scalar_type()), dk, dv, d_initial};
}

Tensor wkv_step_cpu(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                    Tensor& state, const optional<Tensor>& slots) {
  const char* op = "wkv_step_";
  check_dim(op, "k", k, 2, "[N,C]");
  WkvCall call = prepare_wkv(op, w, u, k, v);
  WkvParams& p = call.params;
  p.num_sequences = p.total_tokens = k.size(0);
  check_shape(op, "state", state, {-1, 3, p.channels}, "[num_slots,3,C]");
  GDN_CHECK(state.scalar_type() == acc_type(k.scalar_type()), "[", op, "] state must be ",
            c10::toString(acc_type(k.scalar_type())), ", got ", c10::toString(state.scalar_type()));
  GDN_CHECK(state.is_contiguous(), "[", op,
            "] state is updated in place and must be contiguous, got strides ", state.strides());
  GDN_CHECK(has(slots) || p.num_sequences <= state.size(0), "[", op,
            "] without slots state must hold ", p.num_sequences, " sequences, got ",
            shape_str(state));
  const Tensor host = host_slots(op, slots, p.num_sequences, state.size(0));
  Tensor y = at::empty(k.sizes(), k.options());
  wkv_step(p, state.mutable_data_ptr(), state.size(0), data_or_null(host), y.mutable_data_ptr());
  return y;
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Outputs wkv_meta(const Tensor&, const Tensor&, const Tensor& k, const Tensor&,
                 const optional<Tensor>&, const optional<Tensor>& cu_seqlens,
                 bool output_final_state, bool save) {
  check_dim("wkv", "k", k, 3, "[B,T,C]");
  const c10::SymInt n = has(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : k.sym_size(0);
  const c10::SymInt chunks = k.sym_size(0) * k.sym_size(1) / kWkvChunk + n;
  const auto acc = wkv_acc_options(k);
  const auto states = [&](bool wanted, const c10::SymInt& count) {
    return wanted ? at::empty_symint({count, 3, k.sym_size(2)}, acc) : at::empty({0}, acc);
  };
  return {like(k), states(output_final_state, n), states(save, chunks)};
}

Grads wkv_bwd_meta(const optional<Tensor>&, const optional<Tensor>&, const Tensor& w,
                   const Tensor& u, const Tensor& k, const Tensor& v,
                   const optional<Tensor>& initial_state, const optional<Tensor>&, const Tensor&) {
  return {like(w), like(u), like(k), like(v),
          has(initial_state) ? like(*initial_state) : at::empty({0}, wkv_acc_options(k))};
}

Tensor wkv_step_meta(const Tensor&, const Tensor&, const Tensor& k, const Tensor&, Tensor&,
                     const optional<Tensor>&) {
  return like(k);
}

// --- Autograd
// --------------------------------------------------------------------------------------------------------

struct Wkv : torch::autograd::Function<Wkv> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& w, const Tensor& u,
                               const Tensor& k, const Tensor& v,
                               const optional<Tensor>& initial_state,
                               const optional<Tensor>& cu_seqlens, bool output_final_state) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, final_state, saved] =
        wkv(w, u, k, v, initial_state, cu_seqlens, output_final_state, /*save=*/true);
    ctx->save_for_backward(
        {w, u, k, v, initial_state.value_or(Tensor()), cu_seqlens.value_or(Tensor()), saved});
    ctx->set_materialize_grads(false);
    if (!output_final_state) ctx->mark_non_differentiable({final_state});
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op =
        typed_op<Grads(const optional<Tensor>&, const optional<Tensor>&, const Tensor&,
                       const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                       const optional<Tensor>&, const Tensor&)>("gdn::wkv_bwd");
    variable_list out(7);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const variable_list s = ctx->get_saved_variables();
    std::tie(out[0], out[1], out[2], out[3], out[4]) = op.call(
        given(grads[0]), given(grads[1]), s[0], s[1], s[2], s[3], given(s[4]), given(s[5]), s[6]);
    if (!s[4].defined()) out[4] = Tensor();
    return out;
  }
};

Outputs wkv_autograd(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                     const optional<Tensor>& initial_state, const optional<Tensor>& cu_seqlens,
                     bool output_final_state, bool save) {
  if (wants_grad(w, u, k, v, initial_state)) {
    const variable_list out = Wkv::apply(w, u, k, v, initial_state, cu_seqlens, output_final_state);
    // what was saved is the graph's
    return {out[0], out[1], at::empty({0}, wkv_acc_options(k))};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return wkv(w, u, k, v, initial_state, cu_seqlens, output_final_state, save);
}

Tensor wkv_step_autograd(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                         Tensor& state, const optional<Tensor>& slots) {
  return step_in_place("wkv_step_", "wkv with initial_state", wants_grad(w, u, k, v, state),
                       {&state}, [&] { return wkv_step_(w, u, k, v, state, slots); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, bool output_final_state=False, bool save=False) "
      "-> (Tensor y, Tensor final_state, Tensor saved)");
  m.def(
      "wkv_bwd(Tensor? dy, Tensor? d_final_state, Tensor w, Tensor u, Tensor k, Tensor v, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor saved) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "wkv_step_(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) state, Tensor? slots=None) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("wkv", wkv_cpu);
  m.impl("wkv_bwd", wkv_bwd_cpu);
  m.impl("wkv_step_", wkv_step_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("wkv", wkv_meta);
  m.impl("wkv_bwd", wkv_bwd_meta);
  m.impl("wkv_step_", wkv_step_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("wkv", wkv_autograd);
  m.impl("wkv_step_", wkv_step_autograd);
  m.impl("wkv_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
