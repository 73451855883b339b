// SPDX-License-Identifier: Apache-2.0
// libgdn from an installation: one training step of a small model, on torch's threads.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>

#include <cmath>
#include <cstdio>

#include "gdn/base/parallel.h"
#include "gdn/model/causal_lm.h"

int main() {
  at::set_num_threads(2);
  gdn::ModelConfig config;
  config.vocab_size = 8;
  config.hidden_size = 16;
  config.intermediate_size = 16;
  config.blocks.resize(1);
  config.blocks[0].mixer_options = {{"num_heads", 2}, {"head_dim", 8}};
  gdn::CausalLM model(config);

  const at::Tensor ids = at::full({1, 5}, 3, at::kLong);
  const at::Tensor before = model.loss(ids, ids);
  before.backward();
  {
    const c10::NoGradGuard no_grad;
    for (at::Tensor& parameter : model.parameters()) {
      if (parameter.grad().defined()) parameter.sub_(parameter.grad(), 0.1);
    }
  }
  const double first = before.item<double>(), second = model.loss(ids, ids).item<double>();
  std::printf("%d threads, loss %g -> %g\n", gdn::num_threads(), first, second);
  return gdn::num_threads() == 2 && std::isfinite(second) && second < first ? 0 : 1;
}
