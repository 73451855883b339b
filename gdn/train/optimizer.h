// SPDX-License-Identifier: Apache-2.0
// AdamW (Loshchilov and Hutter, arXiv 1711.05101) over all parameters of a model, by ATen's fused
// kernel, with decay groups and clipping by the global norm.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gdn/model/checkpoint.h"

namespace gdn {

// The parameters of a model, each once (tied weights share one), in a fixed order.
NamedTensors parameters_of(const torch::nn::Module& model);

// Only weights with two or more dimensions decay; A_log, dt_bias, norms and biases never do.
bool decays(const std::string& name, const at::Tensor& parameter);

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;
  double grad_clip = 1.0;  // 0: none
};

class AdamW {
 public:
  AdamW(NamedTensors parameters, const AdamWOptions& options);

  // The global norm of the gradients, as they are.
  double grad_norm() const;
  // One update with learning rate `lr`, of the gradients scaled down to grad_clip where `grad_norm`
  // is above it. Parameters without a gradient stay.
  void step(double lr, double grad_norm);
  void zero_grad();

  const NamedTensors& parameters() const { return parameters_; }
  int64_t steps() const { return steps_; }

  // "exp_avg.<parameter>" and "exp_avg_sq.<parameter>", the optimizer's own tensors.
  NamedTensors state() const;
  // Takes over what state() gave, by name; throws when a name is missing or a shape differs.
  void load_state(const NamedTensors& state, int64_t steps);

 private:
  NamedTensors parameters_;
  std::vector<at::Tensor> exp_avgs_, exp_avg_sqs_, step_counts_;
  AdamWOptions options_;
  int64_t steps_ = 0;
};

}  // namespace gdn
