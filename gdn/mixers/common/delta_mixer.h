// SPDX-License-Identifier: Apache-2.0
// The shape that the mixers on the delta-rule engine have in common:
//   x -> q_proj, k_proj, v_proj -> convolutions -> heads -> [what makes the mixer] -> engine
//     -> norm over each head, gate -> o_proj
// A mixer derives from it, registers its parts in the order of its constructor, and says in
// inputs() what the engine gets.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class DeltaMixer : public Mixer {
 public:
  at::Tensor forward(const at::Tensor& x, const Context& ctx) final;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 protected:
  // Reads the option "mode".
  DeltaMixer(const char* name, const MixerArgs& args);

  // What the engine computes from. Reads and leaves the state's entries but for "recurrent".
  virtual DeltaInputs inputs(const at::Tensor& x, StateAccess& state) = 0;
  // y [B,T,D] from what the engine read, o [B,T,HV,V]; by default the normed and gated output.
  virtual at::Tensor output(const at::Tensor& o, const at::Tensor& x);
  // The sizes of the engine's state; by default sizes_.
  virtual HeadSizes state_sizes() const { return sizes_; }

  // q_proj, k_proj and v_proj of sizes_; with steps > 1, k and v have that many per token.
  void add_qkv(int64_t hidden_size, int64_t steps = 1);
  // Convolutions over q, k and v, see QkvConvolution.
  void add_convolution(const Options& options, Activation qk = Activation::kSilu,
                       Activation v = Activation::kSilu, bool bare_activation = true);
  // Norm, gate and o_proj; reads "norm_eps".
  void add_output(const Options& options, const MixerArgs& args, HeadOutput::Config config);

  // q, k and v of x, projected, convolved and cut into heads; where num_kv_heads_ is smaller than
  // the number of heads, k and v are repeated.
  DeltaInputs project(const at::Tensor& x, StateAccess& state) const;

  HeadSizes sizes_{};
  int64_t num_kv_heads_ = 0;  // 0: as many as sizes_ says

 private:
  const char* name_;
  std::string mode_;
  int64_t steps_ = 1;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_;
  std::optional<QkvConvolution> convolution_;
  std::optional<HeadOutput> output_;
};

}  // namespace gdn
