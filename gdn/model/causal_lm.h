// SPDX-License-Identifier: Apache-2.0
// A language model: embedding, a list of blocks, final norm, head. Parameter names are fla's
// (model.embeddings.weight, model.layers.0.attn.q_proj.weight, ..., lm_head.weight).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "gdn/mixers/mixer.h"
#include "gdn/model/config.h"

namespace gdn {

// The states of all blocks of a model, by block.
struct ModelState {
  std::vector<State> mixer;
  std::vector<State> feed_forward;  // empty States for blocks whose feed-forward keeps none

  int64_t num_sequences() const;
  int64_t bytes() const;
  ModelState clone() const;
  ModelState index(const at::Tensor& sequences) const;
};

struct ModelContext {
  Sequences seqs;
  at::Tensor slots;
  ModelState* state = nullptr;
  Shared* shared = nullptr;
};

class CausalLM : public torch::nn::Module {
 public:
  // Parameters in fp32 on the CPU, initialised like fla from torch's default generator
  // (torch::manual_seed).
  explicit CausalLM(ModelConfig config);
  ~CausalLM() override;

  // ids int64 [B,T] (or [1,T] with cu_seqlens) -> the final norm's output [B,T,D] in the compute
  // dtype.
  at::Tensor hidden(const at::Tensor& ids, const ModelContext& ctx = {});
  // hidden [...,D] -> logits [...,vocab] in fp32.
  at::Tensor logits(const at::Tensor& hidden);
  // Mean cross-entropy in nats over the targets that are not -100; targets int64 [B,T], already
  // shifted. Logits are computed only where there is a target. With gradients the auxiliary losses
  // of the blocks (balance of experts) are added.
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets, const ModelContext& ctx = {});

  ModelState zero_state(int64_t sequences) const;

  // fp32 (default) or bf16: what layers compute in; parameters stay fp32.
  void set_compute_dtype(at::ScalarType dtype);
  // Recomputes each block in backward instead of keeping its activations.
  void set_gradient_checkpointing(bool on);
  void use_naive(bool on);  // of every mixer

  // With every option of every mixer written out, defaults and derived values included.
  const ModelConfig& config() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace gdn
