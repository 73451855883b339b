// SPDX-License-Identifier: Apache-2.0
// The oracle itself: its values against the recurrence worked out by hand, its gradients against
// finite differences.
#include "tests/kernels/delta_rule_problem.h"

namespace gdn::delta_rule_test {
namespace {

// Loss = <d_o, o> + <d_final, final_state>, the function whose gradient backward returns.
double loss(const Problem& problem) {
  Vec o(problem.value_size()), state(problem.state_size);
  delta_rule_naive_forward(problem.params, o.data(), state.data());
  const Vec d_o = problem.d_o.values(), d_final = problem.d_final.values();
  double sum = 0.0;
  for (size_t i = 0; i < o.size(); ++i) sum += o[i] * d_o[i];
  for (size_t i = 0; i < state.size(); ++i) sum += state[i] * d_final[i];
  return sum;
}

void check_gradient(Problem& problem, Buffer& input, const Buffer& gradient,
                    const std::string& what) {
  double* x = static_cast<double*>(input.data());
  const Vec expected = gradient.values();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double kept = x[i], h = 1e-5;
    x[i] = kept + h;
    const double up = loss(problem);
    x[i] = kept - h;
    const double down = loss(problem);
    x[i] = kept;
    EXPECT_NEAR(expected[i], (up - down) / (2 * h), 1e-7 * (1.0 + std::abs(expected[i])))
        << what << "[" << i << "] of " << name(problem.spec);
  }
}

TEST(DeltaRuleNaive, GradientsEqualFiniteDifferences) {
  for (const DeltaGate gate : kGates) {
    for (const DeltaErase erase : kErases) {
      Case c;
      c.gate = gate;
      c.erase = erase;
      c.channel_beta = gate != DeltaGate::kScalar;
      c.l2norm_qk = erase != DeltaErase::kOwn;
      c.H = 1;
      c.HV = 2;
      c.K = 3;
      c.V = 2;
      c.lengths = {4, 0, 2};
      Problem problem(c);
      const Results r = problem.naive();
      check_gradient(problem, problem.q, r.dq, "dq");
      check_gradient(problem, problem.k, r.dk, "dk");
      check_gradient(problem, problem.v, r.dv, "dv");
      check_gradient(problem, problem.a, r.da, "da");
      check_gradient(problem, problem.p, r.dp, "dp");
      check_gradient(problem, problem.g, r.dg, "dg");
      check_gradient(problem, problem.beta, r.dbeta, "dbeta");
      check_gradient(problem, problem.initial, r.d_initial, "d_initial");
    }
  }
}

// K = V = 1 makes the state a number, so two tokens can be worked out on paper.
TEST(DeltaRuleNaive, TwoTokensByHand) {
  double q[] = {2.0, 3.0}, k[] = {0.5, 4.0}, v[] = {7.0, -1.0},
         g[] = {std::log(0.5), std::log(0.25)};
  double beta[] = {2.0, 0.5}, a[] = {0.25, -1.0}, p[] = {3.0, 2.0}, s0 = 10.0;
  DeltaRuleParams x;
  x.num_sequences = 1;
  x.total_tokens = 2;
  x.H = x.HV = x.K = x.V = 1;
  x.dtype = DType::kF64;
  x.gate = DeltaGate::kScalar;
  x.scale = 0.1;
  x.q = q;
  x.k = k;
  x.v = v;
  x.g = g;
  x.beta = beta;
  x.initial_state = &s0;
  double o[2], s;

  x.erase =
      DeltaErase::kKey;  // 5; u = 2 (7 - 2.5) = 9; 9.5.  2.375; u = 0.5 (-1 - 9.5) = -5.25; -18.625
  delta_rule_naive_forward(x, o, &s);
  EXPECT_DOUBLE_EQ(o[0], 1.9);
  EXPECT_DOUBLE_EQ(s, -18.625);
  EXPECT_DOUBLE_EQ(o[1], 0.3 * -18.625);

  x.erase = DeltaErase::kNone;  // 5 + 0.5 * 14 = 12; 3 + 4 * -0.5 = 1
  delta_rule_naive_forward(x, o, &s);
  EXPECT_DOUBLE_EQ(o[0], 2.4);
  EXPECT_DOUBLE_EQ(s, 1.0);

  x.a = a;
  x.erase =
      DeltaErase::kOwn;  // u = 2 (7 - 1.25) = 11.5; 10.75.  2.6875; u = 0.5 (-1 + 2.6875); 6.0625
  delta_rule_naive_forward(x, o, &s);
  EXPECT_DOUBLE_EQ(o[0], 2.15);
  EXPECT_DOUBLE_EQ(s, 6.0625);

  x.p = p;
  x.beta = nullptr;
  x.erase = DeltaErase::kSeparate;  // 5 + 3.5 + 3 * 2.5 = 16;  4 - 4 + 2 * -16 = -32
  delta_rule_naive_forward(x, o, &s);
  EXPECT_DOUBLE_EQ(o[0], 3.2);
  EXPECT_DOUBLE_EQ(s, -32.0);
}

}  // namespace
}  // namespace gdn::delta_rule_test
