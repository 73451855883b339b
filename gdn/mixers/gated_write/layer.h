// SPDX-License-Identifier: Apache-2.0
// A fast-weight memory whose gate lies on the update; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "gdn/mixers/common/delta_mixer.h"

namespace gdn {

class GatedWrite : public DeltaMixer {
 public:
  explicit GatedWrite(const MixerArgs& args);

 protected:
  DeltaInputs inputs(const at::Tensor& x, StateAccess& state) override;

 private:
  std::string shape_;
  double learning_rate_;
  bool normalize_;
  std::shared_ptr<Linear> w_proj_;
};

MixerInfo gated_write_info();

}  // namespace gdn
