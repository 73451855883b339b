// SPDX-License-Identifier: Apache-2.0
// Attention beside a memory: over persistent tokens that every token sees, and over a window or a
// segment of its own sequence.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/common/options.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

// Keys and values that every token sees; their keys have no position and meet the unrotated query.
struct PrefixKeys {
  at::Tensor k, v;  // [N_p,H,D]; undefined: none
};

// The scaled scores [R,T,H,N_p] of the prefix's keys for unrotated queries q0 [R,T,H,D].
at::Tensor prefix_scores(const at::Tensor& q0, const PrefixKeys& prefix, bool naive);

// softmax(q k^T / sqrt(D)) v over the prefix, whose scores are `ahead`, and over k, v (joined, each
// [R,.,H,D]) where visible [T,S] (undefined: everywhere). q [R,T,H,D] -> [R,T,H,D]. With `naive`
// token by token in double.
at::Tensor attend(const at::Tensor& q, const at::Tensor& ahead, at::TensorList k, at::TensorList v,
                  const PrefixKeys& prefix, const at::Tensor& visible, bool naive);

// Causal attention in a sliding window. Its state is a ring: "window_k", "window_v"
// [N,window,H,D], the token at position p in row p % window.
class WindowAttention : public torch::nn::Module {
 public:
  WindowAttention(const Options& options, int64_t in_features, int64_t heads, int64_t head_dim);

  // x [B,T,in] -> [B,T,H D]. `persistent` [N_p,in], undefined: none. `before`: int64 [N], tokens
  // that each sequence has seen.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& persistent, const at::Tensor& before,
                     StateAccess& state, bool naive);
  void add_zero_state(State& state, int64_t sequences, const at::TensorOptions& options) const;

 private:
  struct Ring {
    at::Tensor k, v;  // [R,window,H,D]
  };
  at::Tensor run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const PrefixKeys& prefix, int64_t past, Ring* ring, bool in_place,
                 bool naive) const;

  int64_t num_heads_, head_dim_, window_;
  double rope_theta_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_;
};

// gate(y, m) of the paper's combination: RMSNorm(y) * act(RMSNorm(m)) or its alternatives.
class BranchGate : public torch::nn::Module {
 public:
  BranchGate(const Options& options, int64_t width, double eps);
  at::Tensor forward(const at::Tensor& y, const at::Tensor& m, bool naive);

 private:
  bool silu_, both_, product_;
  std::shared_ptr<RmsNorm> y_norm_, m_norm_;
};

std::vector<MixerOption> branch_gate_options();

MixerOption rope_option();
MixerOption persistent_option();
// The parameter "persistent" [count,D] of that option, undefined for 0.
at::Tensor add_persistent(torch::nn::Module& owner, const Options& options, const MixerArgs& args);

}  // namespace gdn
