// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/attend_step.h"

#include <ATen/ops/empty.h>

#include "gdn/kernels/attend_step.h"
#include "gdn/ops/common.h"

namespace gdn::ops {
namespace {

constexpr const char* kName = "attend_step";

// Dense heads and elements, as the kernel wants them.
at::Tensor dense_tokens(const at::Tensor& x) {
  const bool dense = x.stride(3) == 1 && (x.size(2) == 1 || x.stride(2) == x.size(3));
  return dense ? x : x.contiguous();
}

}  // namespace

bool can_attend_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return q.is_cpu() && q.size(1) == 1 && !wants_grad(q, k, v);
}

at::Tensor attend_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       double scale) {
  check_dim(kName, "q", q, 4, "[B,1,H,K]");
  check_dim(kName, "k", k, 4, "[B,S,HK,K]");
  check_same(kName, "k", k, "q", q);
  check_same(kName, "v", v, "q", q);
  check_shape(kName, "q", q, {k.size(0), 1, -1, k.size(3)}, "[B,1,H,K]");
  check_shape(kName, "v", v, {k.size(0), k.size(1), k.size(2), -1}, "[B,S,HK,V]");
  const at::Tensor query = q.contiguous(), keys = dense_tokens(k), values = dense_tokens(v);
  AttendStepParams p;
  p.B = k.size(0);
  p.S = k.size(1);
  p.H = q.size(2);
  p.HK = k.size(2);
  p.K = k.size(3);
  p.V = v.size(3);
  p.dtype = dtype_of(kName, "q", q);
  p.scale = scale;
  p.q = query.const_data_ptr();
  p.k = keys.const_data_ptr();
  p.v = values.const_data_ptr();
  p.k_stride = keys.stride(1);
  p.k_batch = keys.stride(0);
  p.v_stride = values.stride(1);
  p.v_batch = values.stride(0);
  at::Tensor o = at::empty({p.B, 1, p.H, p.V}, q.options());
  attend_step(p, o.mutable_data_ptr());
  return o;
}

}  // namespace gdn::ops
