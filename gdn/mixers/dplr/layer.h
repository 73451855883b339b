// SPDX-License-Identifier: Apache-2.0
// The generic diagonal-plus-low-rank recurrence as a layer; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class Dplr : public DeltaMixer {
 public:
  explicit Dplr(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  bool free_;
  std::shared_ptr<Linear> a_proj_, b_proj_, s_proj_;
  LowRankDecay decay_;
};

MixerInfo dplr_info();

}  // namespace gdn
