// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/state_access.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/min.h>
#include <ATen/ops/nonzero.h>
#include <c10/core/GradMode.h>

#include "gdn/base/check.h"
#include "gdn/ops/common.h"

namespace gdn {

StateAccess::StateAccess(const char* mixer, const at::Tensor& x, const Context& ctx,
                         const torch::nn::Module& module)
    : ctx_(ctx) {
  GDN_CHECK(x.dim() == 3, "[", mixer, "] x must be [B,T,D], got ", ops::shape_str(x));
  GDN_CHECK(!cu_seqlens().defined() || x.size(0) == 1, "[", mixer,
            "] B must be 1 with cu_seqlens, got ", x.size(0));
  num_sequences_ = ctx.seqs.count(x);
  GDN_CHECK(given() || !ctx.slots.defined(), "[", mixer, "] slots need a state");
  if (!given()) return;
  const int64_t rows = ctx.state->num_sequences();
  if (ctx.slots.defined()) {
    slots_ = ops::host_slots(mixer, ctx.slots, num_sequences_, rows);
  } else {
    GDN_CHECK(rows == num_sequences_, "[", mixer, "] the state must hold ", num_sequences_,
              " sequences, got ", rows);
  }
  if (c10::GradMode::is_enabled()) {
    with_grad_ = x.requires_grad();
    for (const at::Tensor& p : module.parameters()) with_grad_ = with_grad_ || p.requires_grad();
    for (const auto& entry : ctx.state->entries())
      with_grad_ = with_grad_ || entry.second.requires_grad();
  }
  GDN_CHECK(!with_grad_ || !slots_.defined(), "[", mixer, "] slots are not for gradients");
  step_ = !with_grad_ && x.size(1) == 1 && !cu_seqlens().defined();
  GDN_CHECK(
      step_ || !slots_.defined() || slots_.numel() == 0 || at::min(slots_).item<int64_t>() >= 0,
      "[", mixer, "] negative slots are for decoding steps only");
}

at::Tensor StateAccess::read(const char* name) const {
  const at::Tensor& entry = (*ctx_.state)[name];
  if (!slots_.defined()) return entry;
  // A negative slot's row is read like another one and not written.
  return at::index_select(entry, 0, slots_.clamp_min(0).to(entry.device()));
}

void StateAccess::write(const char* name, const at::Tensor& rows) {
  at::Tensor& entry = pool(name);
  if (with_grad_) {
    ctx_.state->set(name, rows);
  } else if (slots_.defined()) {
    const at::Tensor used = at::nonzero(slots_ >= 0).squeeze(1);
    entry.index_copy_(0, slots_.index_select(0, used).to(entry.device()),
                      rows.index_select(0, used.to(rows.device())).to(entry.scalar_type()));
  } else {
    entry.copy_(rows);
  }
}

}  // namespace gdn
