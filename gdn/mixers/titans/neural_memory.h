// SPDX-License-Identifier: Apache-2.0
// The long-term memory of Titans (arXiv 2501.00663) as a part of mixers: projections, convolutions,
// gates and the memory itself; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "gdn/mixers/common/loop_linear.h"
#include "gdn/mixers/common/memory_state.h"
#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/common/options.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

std::vector<MixerOption> neural_memory_options();

class NeuralMemory : public torch::nn::Module {
 public:
  NeuralMemory(const Options& options, const MixerArgs& args);

  // x [B,T,D] -> what the tokens read, [B,T,H,head_dim], each after its own update. `start`: where
  // fresh sequences begin; null: with the learned weights.
  at::Tensor forward(const at::Tensor& x, StateAccess& state, bool naive,
                     const MemoryStart* start = nullptr);
  // The same in a loop over parts of x: with projections() made once, and what they make of a part.
  LoopLinear projections(const at::Tensor& x);
  at::Tensor forward(const std::vector<at::Tensor>& projected, const MemoryStart& learned,
                     StateAccess& state, bool naive, const MemoryStart* start = nullptr);

  // Queries [B,T,H,head_dim] of x for read(); the convolution's inputs are the entry `conv`.
  at::Tensor queries(const at::Tensor& x, StateAccess& state, const char* conv, bool naive);
  // What memories with weights [B,H,P] answer to them.
  at::Tensor read(const at::Tensor& queries, const at::Tensor& weights) const;

  MemoryStart learned_start(at::ScalarType dtype) const;
  // The start after the persistent tokens [N_p,D] have been read from the learned one, and what
  // they read, [1,N_p,H,head_dim]. The convolutions of what follows begin anew.
  MemoryStart start_after(const at::Tensor& persistent, bool naive, at::Tensor* outputs);

  void add_zero_state(State& state, int64_t sequences, const at::TensorOptions& options) const;
  // The entry for the convolution of queries().
  void add_read_state(State& state, const char* conv, int64_t sequences,
                      const at::TensorOptions& options) const;

  int64_t num_heads() const { return num_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t width() const { return num_heads_ * head_dim_; }

 private:
  at::Tensor convolve(ShortConvolution* conv, const at::Tensor& x, StateAccess& state,
                      const char* name, bool naive) const;
  at::Tensor heads(const at::Tensor& x) const;
  at::Tensor normed(const at::Tensor& x, bool naive) const;
  at::Tensor previous_chunk_means(const at::Tensor& logits, StateAccess& state) const;
  void add_rates(ops::MemoryTensors& in, const at::Tensor& projected, StateAccess& state) const;
  void add_norm(ops::MemoryTensors& in, at::ScalarType acc) const;

  int64_t num_heads_ = 0, head_dim_ = 0;
  bool qk_norm_, momentum_, forgetting_, anchored_, per_chunk_, stable_theta_;
  double theta_max_ = 0;
  ops::MemoryConfig config_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, rates_proj_;
  std::shared_ptr<ShortConvolution> q_conv_, k_conv_, v_conv_;
  std::shared_ptr<MemoryWeights> start_;
  at::Tensor rates_bias_;               // [rates * H]: theta, then eta, then alpha
  at::Tensor norm_weight_, norm_bias_;  // [H,head_dim]
};

}  // namespace gdn
