// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn::ops {

// Whether attend_step can take the place of torch's attention: on a CPU, without gradients.
bool can_attend_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// Softmax attention of one query per head, q [B,1,H,K], over a cache k [B,S,HK,K], v [B,S,HK,V],
// both possibly slices of it; see gdn/kernels/attend_step.h. Returns [B,1,H,V] of q's dtype.
at::Tensor attend_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale);

}  // namespace gdn::ops
