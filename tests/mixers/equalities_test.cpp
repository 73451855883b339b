// SPDX-License-Identifier: Apache-2.0
// What the members of the delta-rule family have in common: one recurrence is another one with some
// of its inputs made equal, constant or zero. In double precision, outputs, states and gradients.
#include <ATen/ops/eye.h>
#include <ATen/ops/flip.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <cmath>
#include <functional>
#include <tuple>

#include "gdn/mixers/mixer.h"
#include "gdn/ops/delta_rule.h"

namespace gdn {
namespace {

using nlohmann::json;
using ops::OptionalTensor;

constexpr double kTolerance = 1e-10;

void expect_near(const at::Tensor& actual, const at::Tensor& expected, const char* what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_GT(expected.abs().max().item<double>(), 1e-6) << what << " says nothing";
  EXPECT_LE((actual - expected).abs().max().item<double>(), kTolerance) << what;
}

// --- Recurrences ---

struct Inputs {  // as of ops::delta_rule
  at::Tensor q, k, v;
  OptionalTensor g{}, beta{};
  const char* erase = "key";
  OptionalTensor a{}, p{};
};

class FamilyEqualities : public ::testing::TestWithParam<const char*> {
 protected:
  static constexpr int64_t B = 2, T = 70, H = 2, HV = 4, K = 5, V = 6;

  void SetUp() override {
    torch::manual_seed(11);
    const auto random = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
    const auto unit = [](const at::Tensor& x) { return x / x.norm(2, -1, true); };
    q_ = unit(random({B, T, H, K})).requires_grad_();
    k_ = unit(random({B, T, H, K})).requires_grad_();
    v_ = random({B, T, HV, V}).requires_grad_();
    g_ = at::log_sigmoid(random({B, T, HV}) + 1).detach().requires_grad_();
    beta_ = at::rand({B, T, HV}, at::kDouble).mul(2).requires_grad_();
    state_ = random({B, HV, K, V}).requires_grad_();
    d_o_ = random({B, T, HV, V});
    d_state_ = random({B, HV, K, V});
  }

  std::pair<at::Tensor, at::Tensor> run(const Inputs& in) const {
    const auto [o, final_state, saved] =
        ops::delta_rule(in.q, in.k, in.v, in.g, in.beta, in.a, in.p, {}, state_, {}, true, in.erase,
                        GetParam(), 0, false);
    return {o, final_state};
  }

  // Both must give the same outputs and, by q, k, v, g, beta and the initial state, the same
  // gradients. `g_used`, `beta_used`: whether g_ and beta_ have a part in it.
  void expect_same(const Inputs& one, const Inputs& other, bool g_used = true,
                   bool beta_used = true) const {
    const auto [o1, s1] = run(one);
    const auto [o2, s2] = run(other);
    expect_near(o1, o2, "o");
    expect_near(s1, s2, "final state");
    if (std::string(GetParam()) == "recurrent") return;  // has no gradients
    std::vector<at::Tensor> wrt = {q_, k_, v_, state_};
    if (g_used) wrt.push_back(g_);
    if (beta_used) wrt.push_back(beta_);
    const auto gradients = [&](const at::Tensor& o, const at::Tensor& s) {
      return torch::autograd::grad({(o * d_o_).sum() + (s * d_state_).sum()}, wrt, {},
                                   /*retain_graph=*/true);
    };
    const auto d1 = gradients(o1, s1), d2 = gradients(o2, s2);
    const char* names[] = {"dq", "dk", "dv", "d initial state", "dg or dbeta", "dbeta"};
    for (size_t i = 0; i < wrt.size(); ++i) expect_near(d1[i], d2[i], names[i]);
  }

  at::Tensor per_channel(const at::Tensor& g) const { return g.unsqueeze(3).expand({B, T, HV, K}); }
  // A key for each value head, for forms whose erase or write key is scaled by a value head's beta.
  at::Tensor by_value_head(const at::Tensor& key) const { return key.repeat_interleave(HV / H, 2); }

  at::Tensor q_, k_, v_, g_, beta_, state_, d_o_, d_state_;
};

TEST_P(FamilyEqualities, KdaWithEqualChannelsIsGatedDeltaNet) {
  expect_same({q_, k_, v_, per_channel(g_), beta_}, {q_, k_, v_, g_, beta_});
}

TEST_P(FamilyEqualities, GatedDeltaNetWithoutDecayIsDeltaNet) {
  expect_same({q_, k_, v_, g_ * 0, beta_}, {q_, k_, v_, {}, beta_}, /*g_used=*/false);
  expect_same({q_, k_, v_, per_channel(g_ * 0), beta_}, {q_, k_, v_, {}, beta_}, /*g_used=*/false);
}

TEST_P(FamilyEqualities, WithoutEraseItIsGatedLinearAttention) {
  // Mamba-2's SSD with q = C, k = B, v = dt x: here beta is dt.
  const at::Tensor scaled = v_ * beta_.unsqueeze(3);
  expect_same({q_, k_, v_, g_, beta_, "none"}, {q_, k_, scaled, g_, {}, "none"});
  // Erase with a key of zeros is none.
  const at::Tensor none = at::zeros_like(k_);
  expect_same({q_, k_, v_, g_, beta_, "own", none}, {q_, k_, v_, g_, beta_, "none"});
  expect_same({q_, k_, v_, per_channel(g_), {}, "none"}, {q_, k_, v_, g_, {}, "none"}, true, false);
}

TEST_P(FamilyEqualities, BetaPerColumnIsAGatedWrite) {
  // Equal columns are one beta ...
  const at::Tensor columns = beta_.unsqueeze(3).expand({B, T, HV, V});
  expect_same({q_, k_, v_, g_, columns}, {q_, k_, v_, g_, beta_});
  // ... and with different ones each column is a memory of its own.
  const at::Tensor gate = beta_.unsqueeze(3) * at::rand({V}, at::kDouble);
  const auto [o, s] = run({q_, k_, v_, g_, gate});
  for (int64_t i = 0; i < V; ++i) {
    const auto [oi, si] = run({q_, k_, v_, g_, gate.select(3, i)});
    expect_near(o.select(3, i), oi.select(3, i), "o");
    expect_near(s.select(3, i), si.select(3, i), "state");
  }
}

TEST_P(FamilyEqualities, BetaOnBothKeysIsGatedDeltaNet2) {
  const at::Tensor q = by_value_head(q_), k = by_value_head(k_), beta = beta_.unsqueeze(3);
  const Inputs two = {q, k, v_ * beta, per_channel(g_), {}, "own", k * beta};
  expect_same(two, {q_, k_, v_, g_, beta_});
}

TEST_P(FamilyEqualities, DplrHoldsTheWholeFamily) {
  const at::Tensor q = by_value_head(q_), k = by_value_head(k_), beta = beta_.unsqueeze(3);
  const at::Tensor d = g_.unsqueeze(3).exp();
  // S = (Diag(d) - a b^T) S + k v^T with b = d k, since the delta rule reads the decayed state.
  const Inputs gdn = {q, k, v_ * beta, per_channel(g_), {}, "separate", d * k, -beta * k};
  expect_same(gdn, {q_, k_, v_, g_, beta_});
  const Inputs delta = {q, k, v_ * beta, per_channel(g_ * 0), {}, "separate", k, -beta * k};
  expect_same(delta, {q_, k_, v_, {}, beta_}, /*g_used=*/false);
  // KDA, with channels that differ.
  const at::Tensor g = per_channel(g_) * at::rand({K}, at::kDouble);
  const Inputs kda = {q, k, v_ * beta, g, {}, "separate", g.exp() * k, -beta * k};
  expect_same(kda, {q_, k_, v_, g, beta_});
  // The gated write per key channel: erase key k, write key gate * k.
  const at::Tensor written = k * at::rand({K}, at::kDouble) * beta;
  const Inputs write = {q, written, v_, per_channel(g_ * 0), {}, "separate", k, -written};
  expect_same(write, {q, written, v_, {}, {}, "own", k}, /*g_used=*/false);
  const Inputs linear = {q, k, v_, per_channel(g_), {}, "separate", k * 0, k * 0};
  expect_same(linear, {q_, k_, v_, g_, {}, "none"}, true, /*beta_used=*/false);
}

TEST_P(FamilyEqualities, DeltaProductIsDeltaStepsWithOneDecay) {
  // Two steps per token: the first one decays, the last one is read. In the naive form of the delta
  // rule that is S <- (I - b2 k2 k2^T) (I - b1 k1 k1^T) d S + writes.
  const int64_t n = 2;
  const auto [k2, v2, beta2] =
      std::tuple(at::flip(k_, {1}), at::flip(v_, {1}), at::flip(beta_, {1}));
  const auto between = [&](const at::Tensor& first, const at::Tensor& second) {
    return at::stack({first, second}, 2).flatten(1, 2);
  };
  const auto [o, s] = run({between(at::zeros_like(q_), q_), between(k_, k2), between(v_, v2),
                           between(g_, at::zeros_like(g_)), between(beta_, beta2)});
  c10::NoGradGuard no_grad;
  at::Tensor S = state_;
  const double scale = 1 / std::sqrt(static_cast<double>(K));
  const at::Tensor q = by_value_head(q_);
  const std::vector<at::Tensor> keys = {by_value_head(k_), by_value_head(k2)};
  const std::vector<at::Tensor> values = {v_, v2}, betas = {beta_, beta2};
  for (int64_t t = 0; t < T; ++t) {
    S = S * g_.select(1, t).exp().view({B, HV, 1, 1});
    for (size_t j = 0; j < keys.size(); ++j) {
      const at::Tensor k = keys[j].select(1, t).unsqueeze(3);    // [B,HV,K,1]
      const at::Tensor v = values[j].select(1, t).unsqueeze(2);  // [B,HV,1,V]
      const at::Tensor b = betas[j].select(1, t).view({B, HV, 1, 1});
      S = S + k * (b * (v - k.transpose(2, 3).matmul(S)));
    }
    const at::Tensor read = q.select(1, t).unsqueeze(2).matmul(S).squeeze(2) * scale;
    expect_near(o.select(1, t * n + n - 1), read, "o");
  }
  expect_near(s, S, "state");
}

INSTANTIATE_TEST_SUITE_P(Forms, FamilyEqualities, ::testing::Values("chunk", "recurrent", "naive"),
                         [](const auto& info) { return std::string(info.param); });

// --- Layers ---

std::shared_ptr<Mixer> make(const char* name, const json& options) {
  MixerArgs args;
  args.hidden_size = 8;
  args.options = options;
  auto mixer = make_mixer(name, args);
  mixer->to(at::kDouble);
  return mixer;
}

// Gives `to` the parameters of `from` with the same names and sizes; the others are returned.
std::vector<std::string> copy_parameters(const Mixer& from, Mixer& to) {
  c10::NoGradGuard no_grad;
  const auto source = from.named_parameters();
  std::vector<std::string> missing;
  for (const auto& p : to.named_parameters()) {
    const at::Tensor* value = source.find(p.key());
    if (value != nullptr && value->sizes() == p.value().sizes()) {
      p.value().copy_(*value);
    } else {
      missing.push_back(p.key());
    }
  }
  return missing;
}

// Over whole sequences with and without gradients, and token by token.
void expect_same_layers(Mixer& one, Mixer& other) {
  const at::Tensor x = at::randn({2, 70, 8}, at::kDouble);
  for (const bool grad : {true, false}) {
    c10::AutoGradMode mode(grad);
    expect_near(one.forward(x, {}), other.forward(x, {}), grad ? "chunk form" : "recurrence");
  }
  c10::NoGradGuard no_grad;
  State s1 = one.zero_state(2, at::kDouble), s2 = other.zero_state(2, at::kDouble);
  Context c1, c2;
  c1.state = &s1;
  c2.state = &s2;
  for (int64_t t = 0; t < 5; ++t) {
    expect_near(one.forward(x.narrow(1, t, 1), c1), other.forward(x.narrow(1, t, 1), c2), "step");
  }
}

class LayerEqualities : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(5); }
};

TEST_F(LayerEqualities, DeltaProductWithOneStepIsGatedDeltaNet) {
  const auto gdn = make("gated_delta_net", {{"head_dim", 4}, {"num_heads", 2}, {"num_v_heads", 4}});
  const auto product = make("gated_delta_product", {{"head_dim", 4},
                                                    {"num_heads", 2},
                                                    {"num_v_heads", 4},
                                                    {"num_householder", 1},
                                                    {"allow_neg_eigval", false}});
  EXPECT_TRUE(copy_parameters(*gdn, *product).empty());
  expect_same_layers(*product, *gdn);
}

TEST_F(LayerEqualities, GatedDeltaNetThatNeverForgetsIsDeltaNet) {
  const auto gdn =
      make("gated_delta_net",
           {{"head_dim", 4}, {"num_heads", 2}, {"expand_v", 1.0}, {"use_gate", false}});
  const auto delta = make("delta_net", {{"num_heads", 2}});
  {
    c10::NoGradGuard no_grad;
    gdn->named_parameters()["A_log"].fill_(-1000);  // exp of it is 0
  }
  EXPECT_TRUE(copy_parameters(*gdn, *delta).empty());
  expect_same_layers(*delta, *gdn);
}

TEST_F(LayerEqualities, KimiDeltaAttentionWithEqualChannelsIsGatedDeltaNet) {
  const auto kda = make("kimi_delta_attention", {{"head_dim", 4}, {"num_heads", 2}});
  const auto gdn = make("gated_delta_net", {{"head_dim", 4},
                                            {"num_heads", 2},
                                            {"expand_v", 1.0},
                                            {"output_gate_activation", "sigmoid"}});
  {
    c10::NoGradGuard no_grad;
    auto from = kda->named_parameters();
    const auto first_of_head = [](at::Tensor t) {  // [heads * 4, ...]
      t = t.view({2, 4, -1});
      t.copy_(t.select(1, 0).unsqueeze(1).clone().expand_as(t));
    };
    first_of_head(from["f_proj.1.weight"]);
    first_of_head(from["dt_bias"]);
    from["g_proj.1.bias"].zero_();
    const auto missing = copy_parameters(*kda, *gdn);
    EXPECT_EQ(missing, (std::vector<std::string>{"dt_bias", "a_proj.weight", "g_proj.weight"}));
    auto to = gdn->named_parameters();
    to["dt_bias"].copy_(from["dt_bias"].view({2, 4}).select(1, 0));
    const at::Tensor up = from["f_proj.1.weight"].view({2, 4, -1}).select(1, 0);
    to["a_proj.weight"].copy_(up.matmul(from["f_proj.0.weight"]));
    to["g_proj.weight"].copy_(from["g_proj.1.weight"].matmul(from["g_proj.0.weight"]));
  }
  expect_same_layers(*kda, *gdn);
}

TEST_F(LayerEqualities, GatedDeltaNet2WithGatesOfOneIsKimiDeltaAttentionOfBetaOne) {
  const auto kda = make("kimi_delta_attention", {{"head_dim", 4}, {"num_heads", 2}});
  const auto two = make("gated_delta_net_2", {{"head_dim", 4}, {"num_heads", 2}});
  c10::NoGradGuard no_grad;
  // Without an input the gates are sigmoid(0) = beta = 1/2.
  kda->named_parameters()["b_proj.weight"].zero_();
  EXPECT_EQ(copy_parameters(*kda, *two),
            (std::vector<std::string>{"b_proj.weight", "w_proj.weight"}));
  two->named_parameters()["b_proj.weight"].zero_();
  two->named_parameters()["w_proj.weight"].zero_();
  expect_same_layers(*two, *kda);
}

TEST_F(LayerEqualities, GatedWriteByHeadIsDeltaNet) {
  const auto delta = make("delta_net", {{"num_heads", 2}});
  const auto write =
      make("gated_write", {{"head_dim", 4}, {"num_heads", 2}, {"gate_shape", "scalar"}});
  c10::NoGradGuard no_grad;
  EXPECT_EQ(copy_parameters(*delta, *write),
            (std::vector<std::string>{"w_proj.weight", "w_proj.bias"}));
  write->named_parameters()["w_proj.weight"].copy_(delta->named_parameters()["b_proj.weight"]);
  write->named_parameters()["w_proj.bias"].zero_();
  expect_same_layers(*write, *delta);
  // A gate per value or key channel whose channels are equal is that gate, too.
  for (const char* shape : {"value", "key"}) {
    const auto channels =
        make("gated_write", {{"head_dim", 4}, {"num_heads", 2}, {"gate_shape", shape}});
    copy_parameters(*delta, *channels);
    auto to = channels->named_parameters();
    to["w_proj.weight"].copy_(delta->named_parameters()["b_proj.weight"].repeat_interleave(4, 0));
    to["w_proj.bias"].zero_();
    expect_same_layers(*channels, *delta);
  }
}

TEST_F(LayerEqualities, GlaWithEqualChannelsIsSimpleGla) {
  const auto gla = make("gla", {{"num_heads", 2}, {"expand_k", 1.0}});
  const auto simple = make("simple_gla", {{"num_heads", 2}, {"use_short_conv", false}});
  c10::NoGradGuard no_grad;
  copy_parameters(*gla, *simple);
  auto from = gla->named_parameters();
  auto to = simple->named_parameters();
  const at::Tensor up = from["gk_proj.1.weight"].view({2, 4, -1});
  up.copy_(up.select(1, 0).unsqueeze(1).clone().expand_as(up));
  const at::Tensor bias = from["gk_proj.1.bias"].view({2, 4});
  bias.copy_(bias.select(1, 0).unsqueeze(1).clone().expand_as(bias));
  to["gk_proj.weight"].copy_(up.select(1, 0).matmul(from["gk_proj.0.weight"]));
  to["gk_proj.bias"].copy_(bias.select(1, 0));
  expect_same_layers(*simple, *gla);
}

TEST_F(LayerEqualities, RetentionIsSimpleGlaWithConstantDecay) {
  const auto retention =
      make("retention", {{"num_heads", 2}, {"expand_v", 1.0}, {"rope_theta", 0.0}});
  const auto simple = make(
      "simple_gla", {{"num_heads", 2}, {"use_short_conv", false}, {"gate_logit_normalizer", 1}});
  c10::NoGradGuard no_grad;
  copy_parameters(*retention, *simple);
  auto to = simple->named_parameters();
  to["gk_proj.weight"].zero_();
  // sigmoid(log(gamma / (1 - gamma))) = gamma = 1 - 2^-5, 1 - 2^-6
  to["gk_proj.bias"].select(0, 0).fill_(std::log(31.0));
  to["gk_proj.bias"].select(0, 1).fill_(std::log(63.0));
  expect_same_layers(*retention, *simple);
}

TEST_F(LayerEqualities, LinearAttentionIsTheSumItSays) {
  const at::Tensor x = at::randn({1, 20, 8}, at::kDouble);
  for (const char* map : {"elu", "relu", "performer"}) {
    const auto layer = make("linear_attention", {{"num_heads", 1},
                                                 {"feature_map", map},
                                                 {"do_feature_map_norm", true},
                                                 {"output_norm", "identity"}});
    // With values and outputs left as they are, a value of ones must come back as ones.
    c10::NoGradGuard no_grad;
    auto p = layer->named_parameters();
    p["v_proj.weight"].zero_();
    p["v_proj.weight"].select(1, 0).fill_(1);
    p["o_proj.weight"].copy_(at::eye(8, at::kDouble));
    at::Tensor ones = x.clone();
    ones.select(2, 0).fill_(1);
    const at::Tensor y = layer->forward(ones, {});
    // up to the 1e-10 that is added to the sum
    if (std::string(map) != "relu") {
      EXPECT_TRUE(y.allclose(at::ones_like(y), 0, 1e-7)) << map;
    }
    // and what is read is a mean of the values: it lies between them
    const at::Tensor z = layer->forward(x, {});
    EXPECT_LE(z.max().item<double>(), x.select(2, 0).max().item<double>() + 1e-9) << map;
    EXPECT_GE(z.min().item<double>(), std::min(0.0, x.select(2, 0).min().item<double>()) - 1e-9)
        << map;
  }
}

TEST_F(LayerEqualities, PerformersFeaturesApproachTheSoftmaxKernel) {
  // With many features, the normalised form is softmax attention.
  const auto layer = make("linear_attention", {{"num_heads", 1},
                                               {"feature_map", "performer"},
                                               {"num_features", 20000},
                                               {"do_feature_map_norm", true},
                                               {"output_norm", "identity"}});
  c10::NoGradGuard no_grad;
  auto p = layer->named_parameters();
  const at::Tensor eye = at::eye(8, at::kDouble);
  for (const char* name : {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"})
    p[name].copy_(eye);
  const at::Tensor x = at::randn({1, 12, 8}, at::kDouble) * 0.8;
  const at::Tensor scores = x[0].matmul(x[0].t()) / std::sqrt(8.0);
  const at::Tensor weights = scores.exp().tril();
  const at::Tensor expected = (weights / weights.sum(1, true)).matmul(x[0]);
  EXPECT_LE((layer->forward(x, {})[0] - expected).abs().max().item<double>(), 0.05);
}

}  // namespace
}  // namespace gdn
