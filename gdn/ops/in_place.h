// SPDX-License-Identifier: Apache-2.0
// The Autograd kernel of steps that change a pool of states in place.
#pragma once

#include <initializer_list>

#include "gdn/ops/common.h"

namespace gdn::ops {

// Refuses gradients (`wanted`), naming what to use instead, runs the kernel below and tells
// autograd that the tensors `changed` have changed.
template <typename Run>
at::Tensor step_in_place(const char* op, const char* instead, bool wanted,
                         std::initializer_list<const at::Tensor*> changed, const Run& run) {
  GDN_CHECK(!wanted, "[", op,
            "] the in-place step has no gradient: call it under torch.no_grad(), or use ", instead);
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor out = run();
  for (const at::Tensor* t : changed)
    if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  return out;
}

}  // namespace gdn::ops
