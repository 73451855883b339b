// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/loop_linear.h"

#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>

#include <utility>

#include "gdn/base/check.h"

namespace gdn {

LoopLinear::LoopLinear(std::vector<Linear*> layers, const at::Tensor& x)
    : layers_(std::move(layers)) {
  for (const Linear* layer : layers_) {
    GDN_CHECK(!layer->bias.defined(), "[loop_linear] a layer with a bias is not for loops");
  }
  if (ops::is_few_rows(x)) return;
  std::vector<at::Tensor> weights;
  for (Linear* layer : layers_) {
    if (c10::GradMode::is_enabled()) layer->forget_casts();
    weights.push_back(layer->weight.to(x.scalar_type()));
    sizes_.push_back(layer->weight.size(0));
  }
  weight_.emplace(weights.size() == 1 ? weights[0] : at::cat(weights, 0));
}

std::vector<at::Tensor> LoopLinear::forward(const at::Tensor& part) const {
  if (weight_) {
    const at::Tensor y = weight_->linear(part);
    return sizes_.size() == 1 ? std::vector<at::Tensor>{y} : y.split_with_sizes(sizes_, -1);
  }
  std::vector<at::Tensor> results;
  for (Linear* layer : layers_) results.push_back(layer->forward(part));
  return results;
}

}  // namespace gdn
