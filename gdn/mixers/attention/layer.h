// SPDX-License-Identifier: Apache-2.0
// Causal softmax attention with rotary positions, grouped queries and an optional sliding window;
// README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "gdn/mixers/attention/cache.h"
#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Attention : public Mixer {
 public:
  explicit Attention(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  struct Group;
  struct Kept;
  // q [B,T,H,D] over k, v [B,S,HKV,D], whose last tokens are those of q -> [B,T,H,D].
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const;
  at::Tensor attend_anew(const Group& group, const KvCache& cache, std::vector<Kept>& kept) const;
  at::Tensor attend_in_place(const Group& group, KvCache& cache) const;
  static void replace(State& state, const std::vector<Kept>& kept, int64_t rows);

  int64_t num_heads_, num_kv_heads_, head_dim_;
  int64_t window_;     // 0: everything
  double rope_theta_;  // 0: no rotary positions
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_;
  std::shared_ptr<RmsNorm> q_norm_, k_norm_;
};

MixerInfo attention_info();

}  // namespace gdn
