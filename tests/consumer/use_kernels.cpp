// SPDX-License-Identifier: Apache-2.0
// Two tokens of the ungated delta rule on a 1 x 1 state, by hand: with q = k = 1 and beta = 1 each
// write replaces what was there, so the outputs are the values themselves.
#include <cmath>
#include <cstdio>

#include "gdn/kernels/delta_rule/delta_rule.h"

int main() {
  const float one[2] = {1.0f, 1.0f};
  const float values[2] = {3.0f, -5.0f};
  float outputs[2] = {0.0f, 0.0f};
  gdn::DeltaRuleParams params;
  params.num_sequences = 1;
  params.total_tokens = 2;
  params.H = params.HV = params.K = params.V = 1;
  params.q = params.k = one;
  params.v = values;
  gdn::delta_rule_recurrent_forward(params, {.o = outputs});
  std::printf("%g %g\n", outputs[0], outputs[1]);
  return std::abs(outputs[0] - 3.0f) < 1e-6f && std::abs(outputs[1] + 5.0f) < 1e-6f ? 0 : 1;
}
