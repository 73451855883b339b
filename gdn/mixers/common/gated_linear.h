// SPDX-License-Identifier: Apache-2.0
// What retention, simple_gla and gla share: gated linear attention, S <- exp(g) S + k v^T, whose
// decay g is all that differs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class GatedLinearMixer : public DeltaMixer {
 protected:
  // Reads the options of gated_linear_options and registers q_proj, k_proj and v_proj.
  GatedLinearMixer(const char* name, const MixerArgs& args);
  // The convolutions and the output, which follow the decay's own parameters.
  void add_rest(const MixerArgs& args);

  // g [B,T,heads] or [B,T,heads,K], for all heads or for those that have keys of their own.
  virtual at::Tensor decay(const at::Tensor& x) const = 0;
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

  const Options options_;

 private:
  std::string feature_map_;
};

struct GatedLinearDefaults {
  double expand_v;
  bool use_short_conv;
};
// Their options; those of the decay come before the last one.
std::vector<MixerOption> gated_linear_options(MixerOption expand_k, GatedLinearDefaults defaults,
                                              std::vector<MixerOption> own);

// log(sigmoid(raw)) / normalizer in the dtype that the engine takes.
at::Tensor log_sigmoid_gate(const at::Tensor& raw, double normalizer);
// The option gate_logit_normalizer, which must be positive.
MixerOption gate_normalizer_option();
double gate_normalizer(const Options& options);

}  // namespace gdn
