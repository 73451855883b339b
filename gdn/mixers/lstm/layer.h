// SPDX-License-Identifier: Apache-2.0
// torch.nn.LSTM as a mixer: the baseline with a nonlinear recurrence; README.md of this folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

class Lstm : public Mixer {
 public:
  explicit Lstm(const MixerArgs& args);
  at::Tensor forward(const at::Tensor& x, const Context& ctx) override;
  State zero_state(int64_t sequences, const at::TensorOptions& options) const override;

 private:
  // Outputs of x, and the states h and c [rows,width] after it, from those before.
  at::Tensor run(const at::Tensor& x /* [rows,T,D] */, at::Tensor& h, at::Tensor& c) const;
  at::Tensor run_naive(const at::Tensor& x, at::Tensor& h, at::Tensor& c) const;
  at::Tensor run_packed(const at::Tensor& x /* [1,T,D] */, const at::Tensor& cu, at::Tensor& h,
                        at::Tensor& c) const;
  std::vector<at::Tensor> weights(at::ScalarType dtype) const;

  int64_t width_;
  at::Tensor weight_ih_, weight_hh_, bias_ih_, bias_hh_;  // [4W,D], [4W,W], [4W] or undefined
  std::shared_ptr<Linear> o_proj_;                        // null where width is hidden_size
};

MixerInfo lstm_info();

}  // namespace gdn
