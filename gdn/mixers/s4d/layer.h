// SPDX-License-Identifier: Apache-2.0
// S4D (arXiv 2206.11893): a diagonal time-invariant state space model, a long convolution in
// training and a recurrence in decoding; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class S4d : public Mixer {
 public:
  explicit S4d(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  class Kernel : public torch::nn::Module {
   public:
    Kernel(int64_t channels, int64_t modes);
    at::Tensor log_dt, C, log_A_real, A_imag;  // [D], [D,M,2], [D,M], [D,M]
  };
  // dt A and C (exp(dt A) - 1) / A, complex [D,M].
  struct Modes {
    at::Tensor log_transition, read;
  };
  Modes modes(at::ScalarType dtype) const;

  int64_t channels_, modes_;
  std::shared_ptr<Kernel> kernel_;
  at::Tensor D_;                           // [D]
  std::shared_ptr<Linear> output_linear_;  // to 2D, halved by GLU
};

MixerInfo s4d_info();

}  // namespace gdn
