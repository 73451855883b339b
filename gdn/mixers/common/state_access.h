// SPDX-License-Identifier: Apache-2.0
// How one forward call of a mixer reads and leaves its state, by the rules of mixer.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <string>

#include "gdn/mixers/mixer.h"

namespace gdn {

class StateAccess {
 public:
  // Checks x [B,T,D], cu_seqlens and slots of `ctx` against each other and the state.
  StateAccess(const char* mixer, const at::Tensor& x, const Context& ctx,
              const torch::nn::Module& module);

  bool given() const { return ctx_.state != nullptr; }
  // Whether the state left behind must carry gradients: then entries are replaced, else they are
  // changed in place.
  bool with_grad() const { return with_grad_; }
  // A decoding step: one token for each sequence, in place.
  bool step() const { return step_; }

  int64_t num_sequences() const { return num_sequences_; }
  const at::Tensor& cu_seqlens() const { return ctx_.seqs.cu_seqlens; }
  const at::Tensor& slots() const { return slots_; }  // int64 on the host, or undefined

  // The whole entry, for ops that work in place on the pool.
  at::Tensor& pool(const char* name) { return (*ctx_.state)[name]; }
  // The rows of this call's sequences [N,...].
  at::Tensor read(const char* name) const;
  // Leaves these rows [N,...] behind.
  void write(const char* name, const at::Tensor& rows);

 private:
  const Context& ctx_;
  at::Tensor slots_;
  int64_t num_sequences_;
  bool with_grad_ = false;
  bool step_ = false;
};

}  // namespace gdn
