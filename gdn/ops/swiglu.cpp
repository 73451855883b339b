// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/swiglu.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "gdn/ops/swiglu.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the kernel reads, kept alive while it runs.
struct Call {
  SwigluParams params;
  Rows gate, up;
};

Call prepare(const char* op, const Tensor& gate, const Tensor& up) {
  GDN_CHECK(gate.dim() >= 1 && gate.size(-1) >= 1, "[", op,
            "] gate must be [..., D] with D >= 1, got ", shape_str(gate));
  check_shape(op, "up", up, gate.sizes(), "of the shape of gate");
  check_same(op, "up", up, "gate", gate);
  Call call{{}, rows_of(gate), rows_of(up)};
  SwigluParams& p = call.params;
  p.dtype = dtype_of(op, "gate", gate);
  p.dim = gate.size(-1);
  p.rows = gate.numel() / p.dim;
  p.gate = call.gate.tensor.const_data_ptr();
  p.gate_layout = call.gate.layout;
  p.up = call.up.tensor.const_data_ptr();
  p.up_layout = call.up.layout;
  return call;
}

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  const Call call = prepare("swiglu", gate, up);
  Tensor y = at::empty(gate.sizes(), gate.options());
  swiglu_forward(call.params, y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd_cpu(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const Call call = prepare("swiglu_bwd", gate, up);
  check_shape("swiglu_bwd", "dy", dy, gate.sizes(), "of the shape of gate");
  const Tensor dy_dense = dy.to(gate.scalar_type()).contiguous();
  Tensor dgate = at::empty(gate.sizes(), gate.options()),
         dup = at::empty(gate.sizes(), gate.options());
  swiglu_backward(call.params, dy_dense.const_data_ptr(), dgate.mutable_data_ptr(),
                  dup.mutable_data_ptr());
  return {dgate, dup};
}

Tensor swiglu_meta(const Tensor& gate, const Tensor&) { return like(gate); }

std::tuple<Tensor, Tensor> swiglu_bwd_meta(const Tensor&, const Tensor& gate, const Tensor& up) {
  return {like(gate), like(up)};
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  static const auto op =
      typed_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>(
          "gdn::swiglu_bwd");
  return op.call(dy, gate, up);
}

struct Swiglu : torch::autograd::Function<Swiglu> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return swiglu(gate, up);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dgate, dup] = swiglu_bwd(dy[0], saved[0], saved[1]);
    return {dgate, dup};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("swiglu", swiglu_cpu);
  m.impl("swiglu_bwd", swiglu_bwd_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("swiglu", swiglu_meta);
  m.impl("swiglu_bwd", swiglu_bwd_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("swiglu", with_autograd<Swiglu, &swiglu>);
  m.impl("swiglu_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
