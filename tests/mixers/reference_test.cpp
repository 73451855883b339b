// SPDX-License-Identifier: Apache-2.0
// Each mixer on the delta-rule engine against its equations, written down once more from the papers
// over the parameters' names: one sequence, token by token, in double precision.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <cmath>

#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

using at::Tensor;
using nlohmann::json;

constexpr int64_t T = 12, D = 8;
constexpr double kEps = 1e-6;  // MixerArgs::norm_eps

// A mixer with its parameters by name and what they make of a sequence x [T,D].
class Reference : public ::testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(21);
    x_ = at::randn({T, D}, at::kDouble);
  }

  void make(const char* name, json options) {
    MixerArgs args;
    args.hidden_size = D;
    args.options = std::move(options);
    mixer_ = make_mixer(name, args);
    mixer_->to(at::kDouble);
    c10::NoGradGuard no_grad;
    for (const auto& p : mixer_->named_parameters())  // weights of zero and one say little
      p.value().add_(at::randn_like(p.value()) * 0.3);
  }

  Tensor p(const std::string& name) const { return mixer_->named_parameters()[name]; }
  // x W^T (+ bias)
  Tensor linear(const std::string& name, const Tensor& x) const {
    const Tensor y = x.matmul(p(name + ".weight").t());
    const auto parameters = mixer_->named_parameters();
    const Tensor* bias = parameters.find(name + ".bias");
    return bias ? y + *bias : y;
  }
  Tensor low_rank(const std::string& name, const Tensor& x) const {
    return linear(name + ".1", linear(name + ".0", x));
  }
  // [T, H * n] -> [T, H, n]
  static Tensor heads(const Tensor& x, int64_t H) { return x.view({x.size(0), H, -1}); }
  static Tensor unit(const Tensor& x) { return x * at::rsqrt((x * x).sum(-1, true) + 1e-6); }
  Tensor rms(const Tensor& o, const std::string& norm) const {
    return o * at::rsqrt((o * o).mean(-1, true) + kEps) * p(norm + ".weight");
  }
  // o [T,H,V] by its norm, times `gate` [T, H V], through o_proj
  Tensor finish(const Tensor& o, const std::string& norm, const Tensor& gate) const {
    return linear("o_proj", rms(o, norm).flatten(1) * gate);
  }
  void expect_output(const Tensor& expected) {
    for (const bool grad : {true, false}) {  // chunk form and recurrence
      c10::AutoGradMode mode(grad);
      const Tensor y = mixer_->forward(x_.unsqueeze(0), {}).squeeze(0);
      ASSERT_EQ(y.sizes(), expected.sizes());
      EXPECT_GT(expected.abs().max().item<double>(), 1e-3);
      EXPECT_LE((y - expected).abs().max().item<double>(), 1e-10);
    }
  }

  std::shared_ptr<Mixer> mixer_;
  Tensor x_;
};

// S_t = f(S_{t-1}), o_t = scale S_t^T q_t for the heads of q [T,H,K].
template <typename Step>
Tensor scan(const Tensor& q, int64_t V, double scale, const Step& step) {
  Tensor S = at::zeros({q.size(1), q.size(2), V}, at::kDouble);
  std::vector<Tensor> outs;
  for (int64_t t = 0; t < q.size(0); ++t) {
    S = step(S, t);
    outs.push_back(at::einsum("hkv,hk->hv", {S, q[t]}) * scale);
  }
  return at::stack(outs);
}
Tensor product(const Tensor& a, const Tensor& b) { return a.unsqueeze(-1) * b.unsqueeze(-2); }
// S^T k per head
Tensor read(const Tensor& S, const Tensor& k) { return at::einsum("hkv,hk->hv", {S, k}); }

Tensor grouped(const Tensor& x, int64_t group) { return x.repeat_interleave(group, 1); }

TEST_F(Reference, KimiDeltaAttention) {
  for (const bool safe : {false, true}) {
    make("kimi_delta_attention", {{"head_dim", 3},
                                  {"num_heads", 2},
                                  {"num_v_heads", 4},
                                  {"expand_v", 2.0},
                                  {"use_short_conv", false},
                                  {"safe_gate", safe},
                                  {"lower_bound", -2.0},
                                  {"allow_neg_eigval", true}});
    const Tensor q = grouped(unit(heads(at::silu(linear("q_proj", x_)), 2)), 2);
    const Tensor k = grouped(unit(heads(at::silu(linear("k_proj", x_)), 2)), 2);
    const Tensor v = heads(at::silu(linear("v_proj", x_)), 4);
    const Tensor f = heads(low_rank("f_proj", x_) + p("dt_bias"), 4);
    const Tensor rate = p("A_log").exp().view({1, 4, 1});
    const Tensor g = safe ? -2.0 * at::sigmoid(rate * f) : -rate * at::softplus(f);
    const Tensor beta = 2 * at::sigmoid(linear("b_proj", x_));
    const Tensor o = scan(q, 6, 1 / std::sqrt(3.0), [&](const Tensor& old, int64_t t) {
      const Tensor S = g[t].exp().unsqueeze(2) * old;
      return S + product(k[t], beta[t].unsqueeze(1) * (v[t] - read(S, k[t])));
    });
    expect_output(finish(o, "o_norm", at::sigmoid(low_rank("g_proj", x_))));
  }
}

TEST_F(Reference, GatedDeltaNet) {
  for (const bool erase : {true, false}) {
    make("gated_delta_net", {{"head_dim", 3},
                             {"num_heads", 2},
                             {"num_v_heads", 4},
                             {"use_short_conv", false},
                             {"erase", erase},
                             {"allow_neg_eigval", erase}});
    const Tensor q = grouped(unit(heads(at::silu(linear("q_proj", x_)), 2)), 2);
    const Tensor k = grouped(unit(heads(at::silu(linear("k_proj", x_)), 2)), 2);
    const Tensor v = heads(at::silu(linear("v_proj", x_)), 4);
    const Tensor g = -p("A_log").exp() * at::softplus(linear("a_proj", x_) + p("dt_bias"));
    const Tensor beta = at::sigmoid(linear("b_proj", x_)) * (erase ? 2 : 1);
    const Tensor o = scan(q, 6, 1 / std::sqrt(3.0), [&](const Tensor& old, int64_t t) {
      const Tensor S = g[t].exp().view({4, 1, 1}) * old;
      const Tensor error = erase ? v[t] - read(S, k[t]) : v[t];
      return S + product(k[t], beta[t].unsqueeze(1) * error);
    });
    expect_output(finish(o, "o_norm", at::silu(linear("g_proj", x_))));
  }
}

TEST_F(Reference, DeltaNetWithTheConvolution) {
  make("delta_net", {{"num_heads", 2},
                     {"qk_activation", "relu"},
                     {"qk_norm", "sum"},
                     {"conv_size", 3},
                     {"conv_bias", true},
                     {"use_gate", true}});
  const auto conv = [&](const std::string& name, const Tensor& x) {
    const Tensor w = p(name + ".weight").squeeze(1);  // [channels,3]
    const Tensor padded = at::constant_pad_nd(x, {0, 0, 2, 0});
    Tensor y = p(name + ".bias").expand_as(x);
    for (int64_t j = 0; j < 3; ++j) y = y + padded.narrow(0, j, T) * w.select(1, j);
    return y;
  };
  const auto by_sum = [](const Tensor& x) { return x / x.sum(-1, true).clamp_min(1e-6); };
  const Tensor q = by_sum(heads(at::relu(conv("q_conv1d", linear("q_proj", x_))), 2));
  const Tensor k = by_sum(heads(at::relu(conv("k_conv1d", linear("k_proj", x_))), 2));
  const Tensor v = heads(at::silu(conv("v_conv1d", linear("v_proj", x_))), 2);
  const Tensor beta = at::sigmoid(linear("b_proj", x_));
  const Tensor o = scan(q, 4, 0.5, [&](const Tensor& S, int64_t t) {
    return S + product(k[t], beta[t].unsqueeze(1) * (v[t] - read(S, k[t])));
  });
  expect_output(finish(o, "o_norm", at::silu(linear("g_proj", x_))));
}

TEST_F(Reference, GatedDeltaNet2) {
  make("gated_delta_net_2", {{"head_dim", 3},
                             {"num_heads", 2},
                             {"num_v_heads", 4},
                             {"expand_v", 2.0},
                             {"use_short_conv", false},
                             {"allow_neg_eigval", true}});
  const Tensor q = grouped(unit(heads(at::silu(linear("q_proj", x_)), 2)), 2);
  const Tensor k = grouped(unit(heads(at::silu(linear("k_proj", x_)), 2)), 2);
  const Tensor v = heads(at::silu(linear("v_proj", x_)), 4);
  const Tensor g = -p("A_log").exp().view({1, 4, 1}) *
                   at::softplus(heads(low_rank("f_proj", x_) + p("dt_bias"), 4));
  const Tensor b = grouped(heads(2 * at::sigmoid(linear("b_proj", x_)), 2), 2);  // erase
  const Tensor w = heads(at::sigmoid(linear("w_proj", x_)), 4);                  // write
  const Tensor o = scan(q, 6, 1 / std::sqrt(3.0), [&](const Tensor& old, int64_t t) {
    const Tensor S = g[t].exp().unsqueeze(2) * old;
    return S + product(k[t], w[t] * v[t] - read(S, b[t] * k[t]));
  });
  expect_output(finish(o, "o_norm", at::sigmoid(low_rank("g_proj", x_))));
}

TEST_F(Reference, GatedDeltaProduct) {
  const int64_t n = 3;
  make("gated_delta_product",
       {{"head_dim", 3}, {"num_heads", 2}, {"num_householder", n}, {"use_short_conv", false}});
  const Tensor q = unit(heads(at::silu(linear("q_proj", x_)), 2));
  const Tensor k = unit(at::silu(linear("k_proj", x_)).view({T, n, 2, 3}));
  const Tensor v = at::silu(linear("v_proj", x_)).view({T, n, 2, 6});
  const Tensor g = -p("A_log").exp() * at::softplus(linear("a_proj", x_) + p("dt_bias"));
  const Tensor beta = 2 * at::sigmoid(linear("b_proj", x_)).view({T, n, 2, 1});
  const Tensor o = scan(q, 6, 1 / std::sqrt(3.0), [&](const Tensor& old, int64_t t) {
    Tensor S = g[t].exp().view({2, 1, 1}) * old;
    for (int64_t j = 0; j < n; ++j) {
      S = S + product(k[t][j], beta[t][j] * (v[t][j] - read(S, k[t][j])));
    }
    return S;
  });
  expect_output(finish(o, "o_norm", at::silu(linear("g_proj", x_))));
}

TEST_F(Reference, GatedWrite) {
  for (const std::string shape : {"scalar", "value", "key"}) {
    make("gated_write", {{"head_dim", 3},
                         {"num_heads", 2},
                         {"num_v_heads", 4},
                         {"expand_v", 2.0},
                         {"gate_shape", shape},
                         {"learning_rate", 0.7},
                         {"use_short_conv", false},
                         {"use_gate", true}});
    const Tensor q = grouped(unit(heads(at::silu(linear("q_proj", x_)), 2)), 2);
    const Tensor k = grouped(unit(heads(at::silu(linear("k_proj", x_)), 2)), 2);
    const Tensor v = heads(at::silu(linear("v_proj", x_)), 4);
    const Tensor raw = at::sigmoid(linear("w_proj", x_));
    const Tensor gate = shape == "scalar"  ? raw.view({T, 4, 1, 1})
                        : shape == "value" ? raw.view({T, 4, 1, 6})
                                           : grouped(raw.view({T, 2, 3, 1}), 2);
    const Tensor o = scan(q, 6, 1 / std::sqrt(3.0), [&](const Tensor& S, int64_t t) {
      const Tensor gradient = -product(k[t], v[t] - read(S, k[t]));  // of |S^T k - v|^2 / 2
      return S + gate[t] * (-0.7 * gradient);
    });
    expect_output(finish(o, "o_norm", at::silu(linear("g_proj", x_))));
  }
}

TEST_F(Reference, Dplr) {
  for (const bool free : {false, true}) {
    make("dplr", {{"head_dim", 3},
                  {"num_heads", 2},
                  {"num_v_heads", 4},
                  {"low_rank", free ? "free" : "tied"},
                  {"use_short_conv", false}});
    const Tensor q = grouped(unit(heads(at::silu(linear("q_proj", x_)), 2)), 2);
    const Tensor k = grouped(unit(heads(at::silu(linear("k_proj", x_)), 2)), 2);
    const Tensor v = heads(at::silu(linear("v_proj", x_)), 4);
    Tensor d = (-p("A_log").exp().view({1, 4, 1}) *
                at::softplus(heads(low_rank("f_proj", x_) + p("dt_bias"), 4)))
                   .exp();
    const Tensor b = grouped(unit(heads(linear("b_proj", x_), 2)), 2);
    Tensor a = grouped(heads(linear("a_proj", x_), 2), 2);
    if (free) {
      const Tensor s = grouped(at::sigmoid(linear("s_proj", x_)), 2).unsqueeze(2);
      a = s * unit(a);
      d = d * (1 - s);
    } else {
      a = at::sigmoid(a) * b;
    }
    const Tensor o = scan(q, 3, 1 / std::sqrt(3.0), [&](const Tensor& S, int64_t t) {
      return d[t].unsqueeze(2) * S - product(a[t], read(S, b[t])) + product(k[t], v[t]);
    });
    expect_output(finish(o, "o_norm", at::silu(linear("g_proj", x_))));
  }
}

TEST_F(Reference, LinearAttention) {
  for (const std::string map : {"elementwise_product", "identity", "relu", "elu"}) {
    const bool normalise = map == "elu";
    make("linear_attention", {{"num_heads", 4},
                              {"num_kv_heads", 2},
                              {"feature_map", map},
                              {"do_feature_map_norm", normalise},
                              {"norm_q", normalise},
                              {"norm_k", normalise}});
    const auto phi = [&](const std::string& which, const Tensor& x) {
      if (map == "relu") return at::relu(x);
      if (map == "elu") {
        const Tensor f = at::elu(x) + 1;
        return f / (f.sum(-1, true) + 1e-4);
      }
      if (map == "identity") return x;
      return linear(which + ".layer1", x) * linear(which + ".layer2", x);
    };
    const Tensor q = phi("feature_map_q", heads(linear("q_proj", x_), 4));
    const Tensor k = grouped(phi("feature_map_k", heads(linear("k_proj", x_), 2)), 2);
    const Tensor v = grouped(heads(linear("v_proj", x_), 2), 2);
    const auto add = [&](const Tensor& values) {
      return scan(q, values.size(2), 1 / std::sqrt(2.0),
                  [&](const Tensor& S, int64_t t) { return S + product(k[t], values[t]); });
    };
    Tensor o = add(v);
    if (normalise) o = o / (add(at::ones_like(v.narrow(2, 0, 1))) + 1e-10);
    expect_output(linear("o_proj", rms(o, "norm").flatten(1)));
  }
}

// Pair (x_i, x_{i + K/2}) at position t turns by t theta^(-2i/K).
Tensor rotated(const Tensor& x, double theta) {
  Tensor y = x.clone();
  const int64_t half = x.size(2) / 2;
  for (int64_t t = 0; t < x.size(0); ++t) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(t) *
                           std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
      const Tensor low = x[t].select(1, i), high = x[t].select(1, i + half);
      y[t].select(1, i).copy_(low * std::cos(angle) - high * std::sin(angle));
      y[t].select(1, i + half).copy_(high * std::cos(angle) + low * std::sin(angle));
    }
  }
  return y;
}

TEST_F(Reference, Retention) {
  c10::NoGradGuard no_grad;
  make("retention",
       {{"num_heads", 2}, {"rope_theta", 50.0}, {"gate_fn", "sigmoid"}, {"feature_map", "silu"}});
  const Tensor q = rotated(at::silu(heads(linear("q_proj", x_), 2)), 50);
  const Tensor k = rotated(at::silu(heads(linear("k_proj", x_), 2)), 50);
  const Tensor v = heads(linear("v_proj", x_), 2);
  const double kept[] = {1 - 1 / 32.0, 1 - 1 / 64.0};
  const Tensor gamma =
      at::stack({at::ones({1, 1}, at::kDouble) * kept[0], at::ones({1, 1}, at::kDouble) * kept[1]});
  const Tensor o =
      scan(q, 8, 0.5, [&](const Tensor& S, int64_t t) { return gamma * S + product(k[t], v[t]); });
  expect_output(finish(o, "g_norm", at::sigmoid(linear("g_proj", x_))));
}

TEST_F(Reference, SimpleGla) {
  make("simple_gla", {{"num_heads", 4},
                      {"num_kv_heads", 2},
                      {"use_short_conv", false},
                      {"gate_logit_normalizer", 3}});
  const Tensor q = heads(linear("q_proj", x_), 4);
  const Tensor k = grouped(heads(linear("k_proj", x_), 2), 2);
  const Tensor v = grouped(heads(linear("v_proj", x_), 2), 2);
  const Tensor d = at::sigmoid(linear("gk_proj", x_)).pow(1 / 3.0);
  const Tensor o = scan(q, 2, 1 / std::sqrt(2.0), [&](const Tensor& S, int64_t t) {
    return d[t].view({4, 1, 1}) * S + product(k[t], v[t]);
  });
  expect_output(finish(o, "g_norm_swish_gate", at::silu(linear("g_proj", x_))));
}

TEST_F(Reference, Gla) {
  make("gla", {{"num_heads", 4}, {"num_kv_heads", 2}, {"expand_k", 1.0}, {"clamp_min", -0.06}});
  const Tensor q = heads(linear("q_proj", x_), 4);
  const Tensor k = grouped(heads(linear("k_proj", x_), 2), 2);
  const Tensor v = grouped(heads(linear("v_proj", x_), 2), 2);
  const Tensor g = grouped(heads(at::log_sigmoid(low_rank("gk_proj", x_)) / 16, 2), 2);
  ASSERT_LT(g.min().item<double>(), -0.06);
  ASSERT_GT(g.max().item<double>(), -0.06);
  const Tensor o = scan(q, 2, 1 / std::sqrt(2.0), [&](const Tensor& S, int64_t t) {
    return g[t].clamp_min(-0.06).exp().unsqueeze(2) * S + product(k[t], v[t]);
  });
  expect_output(finish(o, "g_norm_swish_gate", at::silu(linear("g_proj", x_))));
}

TEST_F(Reference, Rwkv7) {
  make("rwkv7", {{"head_dim", 4}, {"decay_low_rank_dim", 3}});
  const Tensor before = at::constant_pad_nd(x_, {0, 0, 1, -1});
  const auto mix = [&](const std::string& name) {
    return x_ + (before - x_) * p("x_" + name).flatten();
  };
  const auto lora = [&](const std::string& name, const Tensor& x, int inner) {
    Tensor h = linear(name + ".lora.0", x);
    if (inner == 1) h = at::tanh(h);
    if (inner == 2) h = at::sigmoid(h);
    return linear(name + ".lora.2", h);
  };
  const Tensor r = heads(linear("r_proj", mix("r")), 2);
  const Tensor w = heads((-std::exp(-0.5) * at::sigmoid(lora("w_lora", mix("w"), 1))).exp(), 2);
  const Tensor raw = linear("k_proj", mix("k"));
  const Tensor v = heads(linear("v_proj", mix("v")), 2);
  const Tensor rate = at::sigmoid(lora("a_lora", mix("a"), 0));
  const Tensor gate = lora("g_lora", mix("g"), 2);
  const Tensor scaled = heads(raw * p("k_k"), 2);
  const Tensor kappa = scaled / scaled.norm(2, -1, true);
  const Tensor k = heads(raw * (1 + (rate - 1) * p("k_a")), 2);
  const Tensor o = scan(r, 4, 1.0, [&](const Tensor& S, int64_t t) {
    return w[t].unsqueeze(2) * S - product(kappa[t] * rate[t].view({2, 4}), read(S, kappa[t])) +
           product(k[t], v[t]);
  });
  const Tensor centred = o - o.mean(2, true);
  const Tensor normed =
      (centred * at::rsqrt((centred * centred).mean(2, true) + 4 * kEps)).flatten(1) *
          p("g_norm.weight") +
      p("g_norm.bias");
  const Tensor bonus = (r * p("r_k") * k).sum(2, true) * v;
  expect_output(linear("o_proj", (normed + bonus.flatten(1)) * gate));
}

}  // namespace
}  // namespace gdn
