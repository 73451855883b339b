// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/rope.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gdn/ops/rope.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor rotate(const char* op, const Tensor& x, const Tensor& positions, double theta,
              optional<int64_t> rotary_dim, bool inverse) {
  check_dim(op, "x", x, 4, "[B,T,H,D]");
  const int64_t batch = x.size(0), length = x.size(1);
  GDN_CHECK(positions.scalar_type() == at::kLong, "[", op, "] positions must be int64, got ",
            c10::toString(positions.scalar_type()));
  GDN_CHECK(positions.sizes() == at::IntArrayRef({length}) ||
                positions.sizes() == at::IntArrayRef({batch, length}),
            "[", op, "] positions must be [T] = [", length, "] or [B,T] = [", batch, ", ", length,
            "], got ", shape_str(positions));
  const Tensor all_positions = positions.expand({batch, length}).contiguous();
  const Rows rows = rows_of(x);
  RopeParams p;
  p.dtype = dtype_of(op, "x", x);
  p.tokens = batch * length;
  p.heads = x.size(2);
  p.dim = x.size(3);
  p.rotary_dim = rotary_dim.value_or(p.dim);
  GDN_CHECK(p.heads >= 1 && p.dim >= 1, "[", op,
            "] x [B,T,H,D] must have H and D of at least 1, got ", shape_str(x));
  GDN_CHECK(p.rotary_dim >= 0 && p.rotary_dim <= p.dim && p.rotary_dim % 2 == 0, "[", op,
            "] rotary_dim must be even and at most D, ", p.dim, ", got ", p.rotary_dim);
  GDN_CHECK(theta > 0, "[", op, "] theta must be positive, got ", theta);
  p.theta = theta;
  p.inverse = inverse;
  p.x = rows.tensor.const_data_ptr();
  p.x_layout = rows.layout;
  p.positions = all_positions.const_data_ptr<int64_t>();
  Tensor y = at::empty(x.sizes(), x.options());
  rope(p, y.mutable_data_ptr());
  return y;
}

Tensor rotary_cpu(const Tensor& x, const Tensor& positions, double theta,
                  optional<int64_t> rotary_dim) {
  return rotate("rotary", x, positions, theta, rotary_dim, false);
}

Tensor rotary_bwd_cpu(const Tensor& dy, const Tensor& positions, double theta,
                      optional<int64_t> rotary_dim) {
  return rotate("rotary_bwd", dy, positions, theta, rotary_dim, true);
}

Tensor rotary_meta(const Tensor& x, const Tensor&, double, optional<int64_t>) { return like(x); }

Tensor rotary_bwd(const Tensor& dy, const Tensor& positions, double theta,
                  optional<int64_t> rotary_dim) {
  static const auto op =
      typed_op<Tensor(const Tensor&, const Tensor&, double, optional<int64_t>)>("gdn::rotary_bwd");
  return op.call(dy, positions, theta, rotary_dim);
}

struct Rotary : torch::autograd::Function<Rotary> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& positions,
                        double theta, optional<int64_t> rotary_dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({positions});
    ctx->saved_data["theta"] = theta;
    ctx->saved_data["rotary_dim"] = rotary_dim;
    return rotary(x, positions, theta, rotary_dim);
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor dx = rotary_bwd(dy[0], saved[0], ctx->saved_data["theta"].toDouble(),
                                 ctx->saved_data["rotary_dim"].toOptional<int64_t>());
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("rotary(Tensor x, Tensor positions, float theta=10000., int? rotary_dim=None) -> Tensor");
  m.def("rotary_bwd(Tensor dy, Tensor positions, float theta, int? rotary_dim) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("rotary", rotary_cpu);
  m.impl("rotary_bwd", rotary_bwd_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("rotary", rotary_meta);
  m.impl("rotary_bwd", rotary_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("rotary", with_autograd<Rotary, &rotary>);
  m.impl("rotary_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
