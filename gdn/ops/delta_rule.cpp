// SPDX-License-Identifier: Apache-2.0
// gdn::delta_rule, gdn::delta_rule_bwd and gdn::delta_rule_step_: checks, CPU, Meta and autograd.
#include "gdn/ops/delta_rule.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <vector>

#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn::ops {
namespace {

using c10::SymInt;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                         at::Tensor, at::Tensor>;

constexpr const char* kOp = "delta_rule";

// The tensors of one call; those that are absent are undefined.
struct Inputs {
  at::Tensor q, k, v, g, beta, a, p, initial_state, cu_seqlens;
  std::string_view erase, form;
  int64_t chunk_size;
  bool qk_l2norm;
};

Inputs inputs_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const OptionalTensor& g, const OptionalTensor& beta, const OptionalTensor& a,
                 const OptionalTensor& p, const OptionalTensor& initial_state,
                 const OptionalTensor& cu_seqlens, std::string_view erase, std::string_view form,
                 int64_t chunk_size, bool qk_l2norm) {
  auto value = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
  return {q,
          k,
          v,
          value(g),
          value(beta),
          value(a),
          value(p),
          value(initial_state),
          value(cu_seqlens),
          erase,
          form,
          chunk_size,
          qk_l2norm};
}

DeltaErase erase_of(const char* op, std::string_view erase) {
  if (erase == "none") return DeltaErase::kNone;
  if (erase == "key") return DeltaErase::kKey;
  if (erase == "own") return DeltaErase::kOwn;
  GDN_CHECK(erase == "separate", "[", op, "] erase must be none, key, own or separate, got ",
            erase);
  return DeltaErase::kSeparate;
}

// Throws unless the (possibly symbolic) sizes of `t` are these.
void check_sizes(const char* op, const char* name, const at::Tensor& t, const char* layout,
                 std::initializer_list<SymInt> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const SymInt& size : sizes) {
    same = same && t.sym_size(i) == size;
    ++i;
  }
  if (same) return;
  std::ostringstream wanted;
  for (const SymInt& size : sizes) wanted << (wanted.tellp() == 0 ? "" : ", ") << size;
  throw Error(str_cat("[", op, "] ", name, " must be ", layout, " = [", wanted.str(), "], got ",
                      shape_str(t)));
}

void check_acc(const char* op, const char* name, const at::Tensor& t, const at::Tensor& q) {
  GDN_CHECK(t.scalar_type() == acc_type(q.scalar_type()), "[", op, "] ", name, " must be ",
            c10::toString(acc_type(q.scalar_type())), " for ", c10::toString(q.scalar_type()),
            " q, got ", c10::toString(t.scalar_type()));
  GDN_CHECK(t.device() == q.device(), "[", op, "] ", name, " must be on the device of q (",
            q.device().str(), "), got ", t.device().str());
}

// The checks that the token axis has no part in: `lead` is [B,T] or [N].
void check_heads(const char* op, const Inputs& x, bool step) {
  const int64_t lead = step ? 1 : 2;
  const char* qk = step ? "[N,H,K]" : "[B,T,H,K]";
  check_dim(op, "q", x.q, lead + 2, qk);
  dtype_of(op, "q", x.q);
  const SymInt n = x.q.sym_size(0), t = x.q.sym_size(1);
  const SymInt H = x.q.sym_size(lead), K = x.q.sym_size(lead + 1);
  auto check_key = [&](const char* name, const at::Tensor& key) {
    if (step) {
      check_sizes(op, name, key, qk, {n, H, K});
    } else {
      check_sizes(op, name, key, qk, {n, t, H, K});
    }
    check_same(op, name, key, "q", x.q);
  };
  check_key("k", x.k);
  check_dim(op, "v", x.v, lead + 2, step ? "[N,HV,V]" : "[B,T,HV,V]");
  check_same(op, "v", x.v, "q", x.q);
  const SymInt HV = x.v.sym_size(lead), V = x.v.sym_size(lead + 1);
  GDN_CHECK(x.v.sym_size(0) == n && (step || x.v.sym_size(1) == t), "[", op,
            "] v must have the leading sizes of q, ", shape_str(x.q), ", got ", shape_str(x.v));
  GDN_CHECK(H >= 1 && HV >= 1 && HV % H == 0, "[", op,
            "] the heads of v (HV) must be a multiple of those of q (H), got HV=", HV,
            " and H=", H);
  GDN_CHECK(K >= 1 && V >= 1, "[", op, "] K and V must be at least 1, got K=", K, " and V=", V);

  const DeltaErase erase = erase_of(op, x.erase);
  const bool wants_a = erase == DeltaErase::kOwn || erase == DeltaErase::kSeparate;
  const bool wants_p = erase == DeltaErase::kSeparate;
  GDN_CHECK(x.a.defined() == wants_a, "[", op, "] erase \"", x.erase, "\" takes ",
            wants_a ? "an a" : "no a");
  GDN_CHECK(x.p.defined() == wants_p, "[", op, "] erase \"", x.erase, "\" takes ",
            wants_p ? "a p" : "no p");
  GDN_CHECK(!wants_p || !x.beta.defined(), "[", op, "] erase \"separate\" takes no beta");
  if (wants_a) check_key("a", x.a);
  if (wants_p) check_key("p", x.p);
  if (x.g.defined()) {
    const bool channel = x.g.dim() == lead + 2;
    const char* layout =
        step ? (channel ? "[N,HV,K]" : "[N,HV]") : (channel ? "[B,T,HV,K]" : "[B,T,HV]");
    if (step && channel) check_sizes(op, "g", x.g, layout, {n, HV, K});
    if (step && !channel) check_sizes(op, "g", x.g, layout, {n, HV});
    if (!step && channel) check_sizes(op, "g", x.g, layout, {n, t, HV, K});
    if (!step && !channel) check_sizes(op, "g", x.g, layout, {n, t, HV});
    check_acc(op, "g", x.g, x.q);
  }
  if (x.beta.defined()) {
    const bool channel = x.beta.dim() == lead + 2;
    const char* layout =
        step ? (channel ? "[N,HV,V]" : "[N,HV]") : (channel ? "[B,T,HV,V]" : "[B,T,HV]");
    if (step && channel) check_sizes(op, "beta", x.beta, layout, {n, HV, V});
    if (step && !channel) check_sizes(op, "beta", x.beta, layout, {n, HV});
    if (!step && channel) check_sizes(op, "beta", x.beta, layout, {n, t, HV, V});
    if (!step && !channel) check_sizes(op, "beta", x.beta, layout, {n, t, HV});
    check_acc(op, "beta", x.beta, x.q);
  }
}

SymInt num_sequences(const Inputs& x) {
  return x.cu_seqlens.defined() ? x.cu_seqlens.sym_size(0) - 1 : x.q.sym_size(0);
}

// Every rule that reads no data; the same on CPU and Meta.
void check_inputs(const char* op, const Inputs& x) {
  check_heads(op, x, /*step=*/false);
  GDN_CHECK(x.form == "chunk" || x.form == "recurrent" || x.form == "naive", "[", op,
            "] form must be chunk, recurrent or naive, got ", x.form);
  GDN_CHECK(x.chunk_size == 0 || x.chunk_size == 16 || x.chunk_size == 32 || x.chunk_size == 64,
            "[", op, "] chunk_size must be 16, 32, 64 or 0 (automatic), got ", x.chunk_size);
  if (x.cu_seqlens.defined()) {
    check_dim(op, "cu_seqlens", x.cu_seqlens, 1, "[N+1]");
    GDN_CHECK(x.q.sym_size(0) == 1, "[", op, "] B must be 1 with cu_seqlens, got ",
              x.q.sym_size(0));
  }
  if (x.initial_state.defined()) {
    check_sizes(op, "initial_state", x.initial_state, "[N,HV,K,V]",
                {num_sequences(x), x.v.sym_size(2), x.q.sym_size(3), x.v.sym_size(3)});
    check_acc(op, "initial_state", x.initial_state, x.q);
  }
}

// Sizes and pointers for the kernels. Holds the contiguous tensors that they point into.
struct Call {
  Inputs x;
  DeltaRuleParams params;

  Call(Inputs inputs, std::optional<double> scale) : x(std::move(inputs)) {
    for (at::Tensor* t : {&x.q, &x.k, &x.v, &x.g, &x.beta, &x.a, &x.p, &x.initial_state})
      if (t->defined()) *t = t->contiguous();
    const bool step = x.q.dim() == 3;
    const int64_t lead = step ? 1 : 2;
    params.total_tokens = step ? x.q.size(0) : x.q.size(0) * x.q.size(1);
    x.cu_seqlens = host_cu_seqlens(kOp, x.cu_seqlens, params.total_tokens);
    params.num_sequences = x.cu_seqlens.defined() ? x.cu_seqlens.size(0) - 1 : x.q.size(0);
    params.cu_seqlens = data_or_null(x.cu_seqlens);
    params.H = x.q.size(lead);
    params.HV = x.v.size(lead);
    params.K = x.q.size(lead + 1);
    params.V = x.v.size(lead + 1);
    params.dtype = dtype_of(kOp, "q", x.q);
    params.gate = !x.g.defined()               ? DeltaGate::kNone
                  : x.g.dim() == x.q.dim() - 1 ? DeltaGate::kScalar
                                               : DeltaGate::kChannel;
    params.channel_beta = x.beta.defined() && x.beta.dim() == x.q.dim();
    params.erase = erase_of(kOp, x.erase);
    params.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(params.K)));
    params.chunk_size = static_cast<int>(x.chunk_size);
    params.l2norm_qk = x.qk_l2norm;
    params.q = data(x.q);
    params.k = data(x.k);
    params.v = data(x.v);
    params.a = data(x.a);
    params.p = data(x.p);
    params.g = data(x.g);
    params.beta = data(x.beta);
    params.initial_state = data(x.initial_state);
  }

  static const void* data(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr() : nullptr;
  }
};

at::TensorOptions acc_options(const at::Tensor& q) {
  return q.options().dtype(acc_type(q.scalar_type()));
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Outputs delta_rule_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const OptionalTensor& g, const OptionalTensor& beta, const OptionalTensor& a,
                       const OptionalTensor& p, std::optional<double> scale,
                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                       bool output_final_state, std::string_view erase, std::string_view form,
                       int64_t chunk_size, bool save, bool qk_l2norm) {
  Inputs inputs = inputs_of(q, k, v, g, beta, a, p, initial_state, cu_seqlens, erase, form,
                            chunk_size, qk_l2norm);
  check_inputs(kOp, inputs);
  const Call call(std::move(inputs), scale);
  const DeltaRuleParams& params = call.params;
  const at::IntArrayRef o_sizes = v.sizes();
  const std::vector<int64_t> state_sizes = {params.num_sequences, params.HV, params.K, params.V};
  const at::TensorOptions acc = acc_options(q);
  at::Tensor final_state = at::empty({0}, acc);
  at::Tensor saved = at::empty({0}, acc);
  if (form == "naive") {
    at::Tensor o = at::empty(o_sizes, v.options().dtype(at::kDouble));
    if (output_final_state) final_state = at::empty(state_sizes, acc.dtype(at::kDouble));
    delta_rule_naive_forward(params, o.mutable_data_ptr<double>(),
                             output_final_state ? final_state.mutable_data_ptr<double>() : nullptr);
    return {o.to(v.scalar_type()), final_state.to(acc), saved};
  }
  at::Tensor o = at::empty(o_sizes, v.options());
  if (output_final_state) final_state = at::empty(state_sizes, acc);
  DeltaRuleOutputs out;
  out.o = o.mutable_data_ptr();
  out.final_state = output_final_state ? final_state.mutable_data_ptr() : nullptr;
  if (form == "recurrent") {
    delta_rule_recurrent_forward(params, out);
    return {o, final_state, saved};
  }
  if (save) {
    const int64_t size = delta_rule_saved_size(params);
    // A kernel that needs nothing saved still gets a pointer: null means that no backward follows.
    saved = at::empty({std::max<int64_t>(size, 1)}, acc);
    out.saved = saved.mutable_data_ptr();
  }
  delta_rule_chunk_forward(params, out);
  return {o, final_state, saved};
}

Outputs delta_rule_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const OptionalTensor& g, const OptionalTensor& beta,
                        const OptionalTensor& a, const OptionalTensor& p,
                        std::optional<double> scale, const OptionalTensor& initial_state,
                        const OptionalTensor& cu_seqlens, bool output_final_state,
                        std::string_view erase, std::string_view form, int64_t chunk_size,
                        bool save, bool qk_l2norm) {
  const Inputs x = inputs_of(q, k, v, g, beta, a, p, initial_state, cu_seqlens, erase, form,
                             chunk_size, qk_l2norm);
  check_inputs(kOp, x);
  // The size of `saved` depends on the data in cu_seqlens; tracing never asks for it (see the
  // autograd kernel).
  GDN_CHECK(!save || form != "chunk", "[", kOp, "] save=True is not for tensors without data");
  const at::TensorOptions acc = acc_options(q);
  at::Tensor final_state = at::empty({0}, acc);
  if (output_final_state) {
    final_state =
        at::empty_symint({num_sequences(x), v.sym_size(2), q.sym_size(3), v.sym_size(3)}, acc);
  }
  return {at::empty_symint(v.sym_sizes(), v.options()), final_state, at::empty({0}, acc)};
}

Grads delta_rule_bwd_cpu(const OptionalTensor& d_o, const OptionalTensor& d_final_state,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const OptionalTensor& g, const OptionalTensor& beta,
                         const OptionalTensor& a, const OptionalTensor& p,
                         std::optional<double> scale, const OptionalTensor& initial_state,
                         const OptionalTensor& cu_seqlens, const at::Tensor& saved_by_forward,
                         std::string_view erase, std::string_view form, int64_t chunk_size,
                         bool qk_l2norm) {
  Inputs inputs = inputs_of(q, k, v, g, beta, a, p, initial_state, cu_seqlens, erase, form,
                            chunk_size, qk_l2norm);
  check_inputs(kOp, inputs);
  const Call call(std::move(inputs), scale);
  const DeltaRuleParams& params = call.params;
  const Inputs& x = call.x;
  const bool naive = form == "naive";
  const at::TensorOptions acc = acc_options(q);
  // The oracle takes and gives double.
  auto wide = [&](at::ScalarType dtype) { return naive ? at::kDouble : dtype; };
  at::Tensor d_o_in, d_state_in;
  if (has(d_o)) d_o_in = d_o->to(wide(q.scalar_type())).contiguous();
  if (has(d_final_state)) {
    d_state_in = d_final_state->to(wide(acc_type(q.scalar_type()))).contiguous();
  }
  auto grad_like = [&](const at::Tensor& t) {
    return t.defined() ? at::empty(t.sizes(), t.options().dtype(wide(t.scalar_type())))
                       : at::empty({0}, acc);
  };
  at::Tensor dq = grad_like(x.q), dk = grad_like(x.k), dv = grad_like(x.v), dg = grad_like(x.g),
             dbeta = grad_like(x.beta), da = grad_like(x.a), dp = grad_like(x.p),
             ds = grad_like(x.initial_state);
  auto out = [](const at::Tensor& input, at::Tensor& grad) -> void* {
    return input.defined() ? grad.mutable_data_ptr() : nullptr;
  };
  if (naive) {
    auto d64 = [&](const at::Tensor& input, at::Tensor& grad) {
      return static_cast<double*>(out(input, grad));
    };
    at::Tensor zero;
    if (!d_o_in.defined()) {
      zero = at::zeros_like(dv);
      d_o_in = zero;
    }
    delta_rule_naive_backward(params, d_o_in.const_data_ptr<double>(),
                              d_state_in.defined() ? d_state_in.const_data_ptr<double>() : nullptr,
                              d64(x.q, dq), d64(x.k, dk), d64(x.v, dv), d64(x.a, da), d64(x.p, dp),
                              d64(x.g, dg), d64(x.beta, dbeta), d64(x.initial_state, ds));
    const at::ScalarType low = q.scalar_type(), high = acc_type(q.scalar_type());
    return {dq.to(low),     dk.to(low), dv.to(low), dg.to(high),
            dbeta.to(high), da.to(low), dp.to(low), ds.to(high)};
  }
  at::Tensor saved = saved_by_forward;
  if (saved.numel() == 0) {
    saved = at::empty({std::max<int64_t>(delta_rule_saved_size(params), 1)}, acc);
    at::Tensor o = at::empty(v.sizes(), v.options());
    DeltaRuleOutputs outputs;
    outputs.o = o.mutable_data_ptr();
    outputs.saved = saved.mutable_data_ptr();
    delta_rule_chunk_forward(params, outputs);
  }
  DeltaRuleGrads grads;
  grads.d_o = Call::data(d_o_in);
  grads.d_final_state = Call::data(d_state_in);
  grads.dq = out(x.q, dq);
  grads.dk = out(x.k, dk);
  grads.dv = out(x.v, dv);
  grads.da = out(x.a, da);
  grads.dp = out(x.p, dp);
  grads.dg = out(x.g, dg);
  grads.dbeta = out(x.beta, dbeta);
  grads.d_initial_state = out(x.initial_state, ds);
  delta_rule_chunk_backward(params, saved.const_data_ptr(), grads);
  return {dq, dk, dv, dg, dbeta, da, dp, ds};
}

Grads delta_rule_bwd_meta(const OptionalTensor&, const OptionalTensor&, const at::Tensor& q,
                          const at::Tensor& k, const at::Tensor& v, const OptionalTensor& g,
                          const OptionalTensor& beta, const OptionalTensor& a,
                          const OptionalTensor& p, std::optional<double>,
                          const OptionalTensor& initial_state, const OptionalTensor&,
                          const at::Tensor&, std::string_view, std::string_view, int64_t, bool) {
  auto grad_like = [&](const OptionalTensor& t) {
    return has(t) ? at::empty_symint(t->sym_sizes(), t->options()) : at::empty({0}, acc_options(q));
  };
  return {grad_like(q),    grad_like(k), grad_like(v), grad_like(g),
          grad_like(beta), grad_like(a), grad_like(p), grad_like(initial_state)};
}

void check_step(const Inputs& x, const at::Tensor& state) {
  constexpr const char* op = "delta_rule_step_";
  check_heads(op, x, /*step=*/true);
  check_dim(op, "state", state, 4, "[num_slots,HV,K,V]");
  check_sizes(op, "state", state, "[num_slots,HV,K,V]",
              {state.sym_size(0), x.v.sym_size(1), x.q.sym_size(2), x.v.sym_size(2)});
  const bool half = state.scalar_type() == at::kBFloat16 && x.q.scalar_type() != at::kDouble;
  if (!half) check_acc(op, "state", state, x.q);
}

at::Tensor delta_rule_step_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const OptionalTensor& g, const OptionalTensor& beta,
                               const OptionalTensor& a, const OptionalTensor& p, at::Tensor& state,
                               const OptionalTensor& slots, std::optional<double> scale,
                               std::string_view erase, bool qk_l2norm) {
  Inputs inputs = inputs_of(q, k, v, g, beta, a, p, {}, {}, erase, "recurrent", 0, qk_l2norm);
  check_step(inputs, state);
  GDN_CHECK(state.is_contiguous(), "[delta_rule_step_] state must be contiguous");
  const at::Tensor host = host_slots("delta_rule_step_", slots, q.size(0), state.size(0));
  GDN_CHECK(host.defined() || state.size(0) >= q.size(0), "[delta_rule_step_] state must hold ",
            q.size(0), " sequences, got ", state.size(0));
  const Call call(std::move(inputs), scale);
  at::Tensor o = at::empty(v.sizes(), v.options());
  DeltaRulePool pool;
  pool.states = state.mutable_data_ptr();
  pool.num_slots = state.size(0);
  pool.slots = data_or_null(host);
  pool.bf16 = state.scalar_type() == at::kBFloat16;
  delta_rule_step(call.params, pool, o.mutable_data_ptr());
  return o;
}

at::Tensor delta_rule_step_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const OptionalTensor& g, const OptionalTensor& beta,
                                const OptionalTensor& a, const OptionalTensor& p, at::Tensor& state,
                                const OptionalTensor&, std::optional<double>,
                                std::string_view erase, bool qk_l2norm) {
  check_step(inputs_of(q, k, v, g, beta, a, p, {}, {}, erase, "recurrent", 0, qk_l2norm), state);
  return at::empty_symint(v.sym_sizes(), v.options());
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class DeltaRuleFunction : public torch::autograd::Function<DeltaRuleFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const OptionalTensor& g,
                               const OptionalTensor& beta, const OptionalTensor& a,
                               const OptionalTensor& p, std::optional<double> scale,
                               const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, bool output_final_state,
                               const std::string& erase, const std::string& form,
                               int64_t chunk_size, bool qk_l2norm) {
    at::AutoDispatchBelowADInplaceOrView below;
    // Under a tracer (torch.compile) sizes must follow from shapes alone, and the size of `saved`
    // does not: backward computes it again there.
    const bool traced =
        c10::impl::dispatch_mode_enabled() || q.key_set().has(c10::DispatchKey::Python);
    const bool save = form == "chunk" && !traced;
    auto [o, final_state, saved] =
        delta_rule(q, k, v, g, beta, a, p, scale, initial_state, cu_seqlens, output_final_state,
                   erase, form, chunk_size, save, qk_l2norm);
    auto value = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({q, k, v, value(g), value(beta), value(a), value(p),
                            value(initial_state), value(cu_seqlens), saved});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["erase"] = erase;
    ctx->saved_data["form"] = form;
    ctx->saved_data["chunk_size"] = chunk_size;
    ctx->saved_data["qk_l2norm"] = qk_l2norm;
    ctx->set_materialize_grads(false);
    if (!output_final_state) ctx->mark_non_differentiable({final_state});
    return {o, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(15);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list x = ctx->get_saved_variables();
    auto optional = [](const at::Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const Grads out = delta_rule_bwd(
        optional(grads[0]), optional(grads[1]), x[0], x[1], x[2], optional(x[3]), optional(x[4]),
        optional(x[5]), optional(x[6]), ctx->saved_data["scale"].toOptional<double>(),
        optional(x[7]), optional(x[8]), x[9], ctx->saved_data["erase"].toStringRef(),
        ctx->saved_data["form"].toStringRef(), ctx->saved_data["chunk_size"].toInt(),
        ctx->saved_data["qk_l2norm"].toBool());
    result[0] = std::get<0>(out);
    result[1] = std::get<1>(out);
    result[2] = std::get<2>(out);
    if (x[3].defined()) result[3] = std::get<3>(out);
    if (x[4].defined()) result[4] = std::get<4>(out);
    if (x[5].defined()) result[5] = std::get<5>(out);
    if (x[6].defined()) result[6] = std::get<6>(out);
    if (x[7].defined()) result[8] = std::get<7>(out);
    return result;
  }
};

Outputs delta_rule_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const OptionalTensor& g, const OptionalTensor& beta,
                            const OptionalTensor& a, const OptionalTensor& p,
                            std::optional<double> scale, const OptionalTensor& initial_state,
                            const OptionalTensor& cu_seqlens, bool output_final_state,
                            std::string_view erase, std::string_view form, int64_t chunk_size,
                            bool save, bool qk_l2norm) {
  if (!wants_grad(q, k, v, g, beta, a, p, initial_state)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return delta_rule(q, k, v, g, beta, a, p, scale, initial_state, cu_seqlens, output_final_state,
                      erase, form, chunk_size, save, qk_l2norm);
  }
  const variable_list out = DeltaRuleFunction::apply(
      q, k, v, g, beta, a, p, scale, initial_state, cu_seqlens, output_final_state,
      std::string(erase), std::string(form), chunk_size, qk_l2norm);
  // What was saved is the graph's; eager and traced calls return the same.
  return {out[0], out[1], at::empty({0}, acc_options(q))};
}

// By hand, for a decoding step is short enough to feel torch's boxed fallbacks.
at::Tensor delta_rule_step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const OptionalTensor& g, const OptionalTensor& beta,
                                    const OptionalTensor& a, const OptionalTensor& p,
                                    at::Tensor& state, const OptionalTensor& slots,
                                    std::optional<double> scale, std::string_view erase,
                                    bool qk_l2norm) {
  GDN_CHECK(!wants_grad(q, k, v, g, beta, a, p, state),
            "[delta_rule_step_] is not differentiable: call it under no_grad, or use delta_rule");
  at::Tensor o;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    o = delta_rule_step_(q, k, v, g, beta, a, p, state, slots, scale, erase, qk_l2norm);
  }
  torch::autograd::impl::bump_version(state);
  return o;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? beta=None, Tensor? a=None, "
      "Tensor? p=None, float? scale=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
      "bool output_final_state=False, str erase=\"key\", str form=\"chunk\", int chunk_size=0, "
      "bool save=False, bool qk_l2norm=False) -> (Tensor o, Tensor final_state, Tensor saved)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "delta_rule_bwd(Tensor? d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, Tensor? g, "
      "Tensor? beta, Tensor? a, Tensor? p, float? scale, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor saved, str erase, str form, int chunk_size, "
      "bool qk_l2norm=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor "
      "da, Tensor dp, "
      "Tensor d_initial_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "delta_rule_step_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? a, "
      "Tensor? p, Tensor(a!) state, Tensor? slots=None, float? scale=None, str erase=\"key\", "
      "bool qk_l2norm=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("delta_rule", &delta_rule_cpu);
  m.impl("delta_rule_bwd", &delta_rule_bwd_cpu);
  m.impl("delta_rule_step_", &delta_rule_step_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("delta_rule", &delta_rule_meta);
  m.impl("delta_rule_bwd", &delta_rule_bwd_meta);
  m.impl("delta_rule_step_", &delta_rule_step_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("delta_rule", &delta_rule_autograd);
  m.impl("delta_rule_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("delta_rule_step_", &delta_rule_step_autograd);
}

}  // namespace gdn::ops
