// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/short_conv.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "gdn/ops/in_place.h"
#include "gdn/ops/short_conv.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, weight, bias, initial_state

bool parse_activation(const char* op, optional<string_view> activation) {
  if (!activation.has_value()) return false;
  GDN_CHECK(*activation == "silu" || *activation == "swish", "[", op,
            "] activation must be None, 'silu' or 'swish', got '", *activation, "'");
  return true;
}

// What the kernel reads, kept alive while it runs.
struct Call {
  ShortConvParams params;
  Tensor x, weight, bias, initial, cu_seqlens;
};

// The parts that whole sequences and the step have in common; x is [rows, C] whatever its leading
// dimensions.
Call prepare(const char* op, const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
             optional<string_view> activation) {
  check_dim(op, "weight", weight, 2, "[C,W]");
  Call call;
  ShortConvParams& p = call.params;
  p.dtype = dtype_of(op, "x", x);
  p.channels = x.size(-1);
  p.width = weight.size(1);
  p.silu = parse_activation(op, activation);
  GDN_CHECK(p.channels >= 1, "[", op, "] x must have at least 1 channel, got ", shape_str(x));
  GDN_CHECK(p.width >= 1 && p.width <= kMaxConvWidth, "[", op,
            "] the width W of weight [C,W] must be 1 to ", kMaxConvWidth, ", got ",
            shape_str(weight));
  check_shape(op, "weight", weight, {p.channels, p.width}, "[C,W]");
  const Rows rows = rows_of(x);
  call.x = rows.layout.group == 1 ? rows.tensor : x.contiguous();
  p.x = call.x.const_data_ptr();
  p.x_stride = rows.layout.group == 1 ? rows.layout.stride : p.channels;
  const at::ScalarType acc = acc_type(x.scalar_type());
  call.weight = weight.to(acc).contiguous();
  p.weight = call.weight.const_data_ptr();
  if (has(bias)) {
    check_shape(op, "bias", *bias, {p.channels}, "[C]");
    call.bias = bias->to(acc).contiguous();
    p.bias = call.bias.const_data_ptr();
  }
  return call;
}

Call prepare_sequences(const char* op, const Tensor& x, const Tensor& weight,
                       const optional<Tensor>& bias, const optional<Tensor>& initial_state,
                       const optional<Tensor>& cu_seqlens, optional<string_view> activation) {
  check_dim(op, "x", x, 3, "[B,T,C]");
  Call call = prepare(op, x, weight, bias, activation);
  ShortConvParams& p = call.params;
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
    check_shape(op, "initial_state", *initial_state, {p.num_sequences, p.channels, p.width},
                "[N,C,W]");
    check_same(op, "initial_state", *initial_state, "x", x);
    call.initial = initial_state->contiguous();
    p.initial = call.initial.const_data_ptr();
  }
  return call;
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> causal_conv1d_cpu(const Tensor& x, const Tensor& weight,
                                             const optional<Tensor>& bias,
                                             const optional<Tensor>& initial_state,
                                             const optional<Tensor>& cu_seqlens,
                                             bool output_final_state,
                                             optional<string_view> activation) {
  const Call call =
      prepare_sequences("causal_conv1d", x, weight, bias, initial_state, cu_seqlens, activation);
  const ShortConvParams& p = call.params;
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor final_state = output_final_state
                           ? at::empty({p.num_sequences, p.channels, p.width}, x.options())
                           : at::empty({0}, x.options());
  short_conv_forward(p, y.mutable_data_ptr(),
                     output_final_state ? final_state.mutable_data_ptr() : nullptr);
  return {y, final_state};
}

Grads causal_conv1d_bwd_cpu(const optional<Tensor>& dy, const optional<Tensor>& d_final_state,
                            const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                            const optional<Tensor>& initial_state,
                            const optional<Tensor>& cu_seqlens, optional<string_view> activation) {
  const char* op = "causal_conv1d_bwd";
  const Call call = prepare_sequences(op, x, weight, bias, initial_state, cu_seqlens, activation);
  const ShortConvParams& p = call.params;
  ShortConvGrads g;
  const optional<Tensor> dy_dense = contiguous_as(dy, x.scalar_type());
  const optional<Tensor> d_final = contiguous_as(d_final_state, x.scalar_type());
  if (has(dy)) check_shape(op, "dy", *dy, x.sizes(), "[B,T,C]");
  if (has(d_final))
    check_shape(op, "d_final_state", *d_final, {p.num_sequences, p.channels, p.width}, "[N,C,W]");
  g.dy = data_or_null(dy_dense);
  g.d_final = data_or_null(d_final);
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dweight = at::empty(weight.sizes(), call.weight.options());
  Tensor dbias =
      has(bias) ? at::empty(bias->sizes(), call.bias.options()) : at::empty({0}, x.options());
  Tensor d_initial =
      at::empty(has(initial_state) ? initial_state->sizes() : at::IntArrayRef{0}, x.options());
  g.dx = dx.mutable_data_ptr();
  g.dweight = dweight.mutable_data_ptr();
  if (has(bias)) g.dbias = dbias.mutable_data_ptr();
  if (has(initial_state)) g.d_initial = d_initial.mutable_data_ptr();
  short_conv_backward(p, g);
  if (has(bias)) dbias = dbias.to(bias->scalar_type());
  return {dx, dweight.to(weight.scalar_type()), dbias, d_initial};
}

Tensor causal_conv1d_update_cpu(const Tensor& x, Tensor& conv_state, const Tensor& weight,
                                const optional<Tensor>& bias, const optional<Tensor>& slots,
                                optional<string_view> activation) {
  const char* op = "causal_conv1d_update_";
  GDN_CHECK(x.dim() == 2 || (x.dim() == 3 && x.size(1) == 1), "[", op,
            "] x must be [N,C] or [N,1,C], got ", shape_str(x));
  Call call = prepare(op, x, weight, bias, activation);
  ShortConvParams& p = call.params;
  p.num_sequences = x.size(0);
  check_shape(op, "conv_state", conv_state, {-1, p.channels, p.width}, "[S,C,W]");
  check_same(op, "conv_state", conv_state, "x", x);
  GDN_CHECK(conv_state.is_contiguous(), "[", op,
            "] conv_state is updated in place and must be contiguous, got strides ",
            conv_state.strides());
  const int64_t num_slots = conv_state.size(0);
  GDN_CHECK(has(slots) || p.num_sequences <= num_slots, "[", op,
            "] without slots conv_state [S,C,W] must have S >= ", p.num_sequences, ", got ",
            shape_str(conv_state));
  const Tensor host = host_slots(op, slots, p.num_sequences, num_slots);
  Tensor y = at::empty(x.sizes(), x.options());
  short_conv_step(p, conv_state.mutable_data_ptr(), num_slots, data_or_null(host),
                  y.mutable_data_ptr());
  return y;
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Tensor like_or_empty(const optional<Tensor>& t, const Tensor& x) {
  return has(t) ? like(*t) : at::empty({0}, x.options());
}

std::tuple<Tensor, Tensor> causal_conv1d_meta(const Tensor& x, const Tensor& weight,
                                              const optional<Tensor>&, const optional<Tensor>&,
                                              const optional<Tensor>& cu_seqlens,
                                              bool output_final_state, optional<string_view>) {
  check_dim("causal_conv1d", "x", x, 3, "[B,T,C]");
  check_dim("causal_conv1d", "weight", weight, 2, "[C,W]");
  if (!output_final_state) return {like(x), at::empty({0}, x.options())};
  const c10::SymInt n = has(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0);
  return {like(x), at::empty_symint({n, x.sym_size(2), weight.sym_size(1)}, x.options())};
}

Grads causal_conv1d_bwd_meta(const optional<Tensor>&, const optional<Tensor>&, const Tensor& x,
                             const Tensor& weight, const optional<Tensor>& bias,
                             const optional<Tensor>& initial_state, const optional<Tensor>&,
                             optional<string_view>) {
  return {like(x), like(weight), like_or_empty(bias, x), like_or_empty(initial_state, x)};
}

Tensor causal_conv1d_update_meta(const Tensor& x, Tensor&, const Tensor&, const optional<Tensor>&,
                                 const optional<Tensor>&, optional<string_view>) {
  return like(x);
}

// --- Autograd
// --------------------------------------------------------------------------------------------------------

Grads causal_conv1d_bwd(const optional<Tensor>& dy, const optional<Tensor>& d_final_state,
                        const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                        const optional<Tensor>& initial_state, const optional<Tensor>& cu_seqlens,
                        optional<string_view> activation) {
  static const auto op =
      typed_op<Grads(const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const Tensor&,
                     const optional<Tensor>&, const optional<Tensor>&, const optional<Tensor>&,
                     optional<string_view>)>("gdn::causal_conv1d_bwd");
  return op.call(dy, d_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
}

struct CausalConv1d : torch::autograd::Function<CausalConv1d> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const optional<Tensor>& bias, const optional<Tensor>& initial_state,
                               const optional<Tensor>& cu_seqlens, bool output_final_state,
                               optional<string_view> activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, bias.value_or(Tensor()), initial_state.value_or(Tensor()),
                            cu_seqlens.value_or(Tensor())});
    if (activation.has_value()) ctx->saved_data["activation"] = std::string(*activation);
    ctx->set_materialize_grads(false);
    auto [y, final_state] =
        causal_conv1d(x, weight, bias, initial_state, cu_seqlens, output_final_state, activation);
    if (!output_final_state) ctx->mark_non_differentiable({final_state});
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list out(7);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const auto activation = ctx->saved_data.find("activation");
    optional<string_view> name;
    if (activation != ctx->saved_data.end()) name = activation->second.toStringRef();
    auto [dx, dweight, dbias, d_initial] =
        causal_conv1d_bwd(given(grads[0]), given(grads[1]), saved[0], saved[1], given(saved[2]),
                          given(saved[3]), given(saved[4]), name);
    out[0] = dx;
    out[1] = dweight;
    if (saved[2].defined()) out[2] = dbias;
    if (saved[3].defined()) out[3] = d_initial;
    return out;
  }
};

Tensor causal_conv1d_update_autograd(const Tensor& x, Tensor& conv_state, const Tensor& weight,
                                     const optional<Tensor>& bias, const optional<Tensor>& slots,
                                     optional<string_view> activation) {
  return step_in_place(
      "causal_conv1d_update_", "causal_conv1d with initial_state",
      wants_grad(x, conv_state, weight, bias), {&conv_state},
      [&] { return causal_conv1d_update_(x, conv_state, weight, bias, slots, activation); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, "
      "bool output_final_state=False, str? activation=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor? dy, Tensor? d_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, str? activation) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "causal_conv1d_update_(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, "
      "Tensor? slots=None, "
      "str? activation=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d_cpu);
  m.impl("causal_conv1d_bwd", causal_conv1d_bwd_cpu);
  m.impl("causal_conv1d_update_", causal_conv1d_update_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("causal_conv1d", causal_conv1d_meta);
  m.impl("causal_conv1d_bwd", causal_conv1d_bwd_meta);
  m.impl("causal_conv1d_update_", causal_conv1d_update_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("causal_conv1d", with_autograd<CausalConv1d, &causal_conv1d>);
  m.impl("causal_conv1d_update_", causal_conv1d_update_autograd);
  m.impl("causal_conv1d_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
