// SPDX-License-Identifier: Apache-2.0
// Equalities in double precision between forms and between mixers: Mamba, Mamba-2, RWKV-4, S4D,
// LSTM and the attention variants.
#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"
#include "gdn/ops/delta_rule.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::shared_ptr<Mixer> make(const char* name, int64_t hidden_size, const json& options,
                            int64_t layer = 0, int64_t layers = 1) {
  MixerArgs args;
  args.hidden_size = hidden_size;
  args.options = options;
  args.layer_idx = layer;
  args.num_layers = layers;
  auto mixer = make_mixer(name, args);
  mixer->to(at::kDouble);
  return mixer;
}

at::Tensor parameter(const Mixer& mixer, const std::string& name) {
  return mixer.named_parameters()[name].detach();
}

void copy_parameters(const Mixer& from, Mixer& to) {
  c10::NoGradGuard no_grad;
  auto target = to.named_parameters();
  for (const auto& p : from.named_parameters()) target[p.key()].copy_(p.value());
}

// Whole, one token at a time from a state, and a prefill followed by steps.
std::vector<at::Tensor> all_ways(Mixer& mixer, const at::Tensor& x) {
  c10::NoGradGuard no_grad;
  std::vector<at::Tensor> results = {mixer.forward(x, {})};
  for (const int64_t prefill : {int64_t{0}, x.size(1) / 2}) {
    State state = mixer.zero_state(x.size(0), x.options());
    Context ctx;
    ctx.state = &state;
    std::vector<at::Tensor> parts;
    if (prefill > 0) parts.push_back(mixer.forward(x.narrow(1, 0, prefill), ctx));
    for (int64_t t = prefill; t < x.size(1); ++t)
      parts.push_back(mixer.forward(x.narrow(1, t, 1), ctx));
    results.push_back(at::cat(parts, 1));
  }
  return results;
}

void expect_near(const at::Tensor& actual, const at::Tensor& expected, double tol,
                 const char* what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_GT(expected.abs().max().item<double>(), 1e-6) << what << " is all but zero";
  EXPECT_LE((actual - expected).abs().max().item<double>(), tol) << what;
}

TEST(Equalities, ChunkRecurrentStepAndNaive) {
  const std::pair<const char*, json> cases[] = {
      {"mamba", {{"state_size", 4}}},
      {"mamba", {{"allow_neg_eigval", true}}},
      {"mamba2", {{"state_size", 6}, {"head_dim", 4}, {"n_groups", 2}}},
      {"rwkv4", json::object()},
      {"s4d", {{"state_size", 6}}},
      {"lstm", json::object()},
      {"attention", {{"window_size", 7}}},
      {"gated_attention", {{"head_dim", 8}, {"num_heads", 2}}},
      {"mla", {{"num_heads", 2}, {"qk_nope_head_dim", 6}}},
  };
  for (const auto& [name, options] : cases) {
    torch::manual_seed(3);
    const auto mixer = make(name, 16, options);
    const at::Tensor x = at::randn({2, 75, 16}, at::kDouble);
    mixer->use_naive(true);
    const at::Tensor expected = mixer->forward(x, {}).detach();
    mixer->use_naive(false);
    for (const at::Tensor& way : all_ways(*mixer, x)) expect_near(way, expected, 1e-10, name);
  }
}

// Mamba-2 = the recurrence of simple GLA (scalar decay, no erase) with q = C, k = B, v = dt x.
TEST(Equalities, Mamba2IsSimpleGlaUnderItsSubstitution) {
  torch::manual_seed(4);
  const int64_t D = 10, H = 4, P = 5, G = 2, S = 3, T = 70;
  const auto mixer = make("mamba2", D, {{"head_dim", P}, {"n_groups", G}, {"state_size", S}});
  const at::Tensor x = at::randn({2, T, D}, at::kDouble);
  const at::Tensor parts = at::einsum("btd,ed->bte", {x, parameter(*mixer, "in_proj.weight")});
  const at::Tensor w = parameter(*mixer, "conv1d.weight"), b = parameter(*mixer, "conv1d.bias");
  const int64_t width = H * P, keys = G * S;
  const at::Tensor in = parts.narrow(2, width, width + 2 * keys);
  const at::Tensor padded = at::cat({at::zeros({2, 3, in.size(2)}, at::kDouble), in}, 1);
  at::Tensor conv = at::zeros_like(in) + b;
  for (int64_t j = 0; j < 4; ++j)
    conv = conv + padded.narrow(1, j, T) * w.select(2, j).select(1, 0);
  conv = at::silu(conv);
  const at::Tensor dt =
      at::softplus(parts.narrow(2, 2 * width + 2 * keys, H) + parameter(*mixer, "dt_bias"));
  const at::Tensor value = conv.narrow(2, 0, width).view({2, T, H, P});
  // The recurrence itself, token by token, heads sharing B and C group by group.
  at::Tensor state = at::zeros({2, H, S, P}, at::kDouble);
  const at::Tensor g = -parameter(*mixer, "A_log").exp() * dt;
  const auto per_head = [&](int64_t from) {
    return conv.narrow(2, from, keys).view({2, T, G, S}).repeat_interleave(H / G, 2);
  };
  const at::Tensor k = per_head(width), q = per_head(width + keys);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < T; ++t) {
    state = g.select(1, t).exp().unsqueeze(-1).unsqueeze(-1) * state +
            at::einsum("bhs,bhp->bhsp",
                       {k.select(1, t), dt.select(1, t).unsqueeze(-1) * value.select(1, t)});
    rows.push_back(at::einsum("bhs,bhsp->bhp", {q.select(1, t), state}));
  }
  at::Tensor y = at::stack(rows, 1) + parameter(*mixer, "D").unsqueeze(-1) * value;
  y = (y.view({2, T, width}) * at::silu(parts.narrow(2, 0, width)));
  // A norm for each group, then one weight.
  const at::Tensor grouped = y.view({2, T, G, width / G});
  y = (grouped * (grouped.square().mean(-1, true) + 1e-6).rsqrt()).view({2, T, width}) *
      parameter(*mixer, "norm.weight");
  y = at::einsum("bte,de->btd", {y, parameter(*mixer, "out_proj.weight")});
  for (const at::Tensor& way : all_ways(*mixer, x)) expect_near(way, y, 1e-10, "mamba2");
}

TEST(Equalities, MlaAbsorbedIsExpanded) {
  const json shapes[] = {
      {{"num_heads", 3}, {"qk_nope_head_dim", 4}, {"v_head_dim", 6}, {"kv_lora_rank", 7}},
      {{"num_heads", 2}, {"qk_nope_head_dim", 5}, {"qk_rope_head_dim", 0}, {"q_lora_rank", 4}}};
  for (json options : shapes) {
    torch::manual_seed(5);
    const auto absorbed = make("mla", 12, options);
    options["absorb"] = false;
    const auto expanded = make("mla", 12, options);
    copy_parameters(*absorbed, *expanded);
    const at::Tensor x = at::randn({2, 33, 12}, at::kDouble);
    const auto left = all_ways(*absorbed, x), right = all_ways(*expanded, x);
    for (size_t i = 0; i < left.size(); ++i) expect_near(left[i], right[i], 1e-10, "mla");
  }
}

TEST(Equalities, AWindowOfTheWholeSequenceIsFullAttention) {
  torch::manual_seed(6);
  const int64_t T = 90;
  const auto full = make("attention", 16, {{"num_heads", 2}});
  const at::Tensor x = at::randn({2, T, 16}, at::kDouble);
  for (const int64_t window : {T, T + 1, T - 1}) {
    const auto windowed = make("attention", 16, {{"num_heads", 2}, {"window_size", window}});
    copy_parameters(*full, *windowed);
    const at::Tensor expected = full->forward(x, {}).detach();
    const auto ways = all_ways(*windowed, x);
    if (window >= T) {
      for (const at::Tensor& way : ways) expect_near(way, expected, 1e-10, "window");
    } else {  // the last token lacks the first
      EXPECT_GT((ways[0] - expected).select(1, T - 1).abs().max().item<double>(), 1e-8);
      expect_near(ways[0].narrow(1, 0, T - 1), expected.narrow(1, 0, T - 1), 1e-10, "window");
    }
  }
}

// The quotient of the sums written out against the kernel's stable recurrence, far beyond what a
// plain exponential holds.
TEST(Equalities, Rwkv4StableIsTheDirectSum) {
  torch::manual_seed(7);
  const int64_t D = 6, T = 60;
  const auto mixer = make("rwkv4", D, json::object(), 1, 3);
  const at::Tensor x = at::randn({1, T, D}, at::kDouble);
  for (const double size : {1.0, 2000.0}) {
    {
      c10::NoGradGuard no_grad;
      mixer->named_parameters()["key.weight"].mul_(size);
    }
    const at::Tensor before =
        at::cat({at::zeros({1, 1, D}, at::kDouble), x.narrow(1, 0, T - 1)}, 1);
    const auto project = [&](const char* mix, const char* weight) {
      const at::Tensor mu = parameter(*mixer, mix);
      return at::einsum("btd,ed->bte", {mu * x + (1 - mu) * before, parameter(*mixer, weight)})
          .squeeze(0);
    };
    const at::Tensor k = project("time_mix_key", "key.weight");
    const at::Tensor v = project("time_mix_value", "value.weight");
    const at::Tensor r = project("time_mix_receptance", "receptance.weight");
    const at::Tensor w = -parameter(*mixer, "time_decay").exp(),
                     u = parameter(*mixer, "time_first");
    std::vector<at::Tensor> rows;
    for (int64_t t = 0; t < T; ++t) {
      std::vector<at::Tensor> exponents;
      for (int64_t i = 0; i < t; ++i)
        exponents.push_back(w * static_cast<double>(t - 1 - i) + k.select(0, i));
      exponents.push_back(u + k.select(0, t));
      const at::Tensor weights = at::stack(exponents, 0).softmax(0);  // [t+1,D]
      rows.push_back((weights * v.narrow(0, 0, t + 1)).sum(0));
    }
    const at::Tensor y = at::einsum(
        "te,de->td", {r.sigmoid() * at::stack(rows, 0), parameter(*mixer, "output.weight")});
    for (const at::Tensor& way : all_ways(*mixer, x))
      expect_near(way, y.unsqueeze(0), 1e-10, "rwkv4");
  }
}

TEST(Initialisation, IsThatOfThePapers) {
  const auto rwkv = make("rwkv4", 5, json::object(), 2, 4);
  const at::Tensor decay = parameter(*rwkv, "time_decay");
  EXPECT_NEAR(decay[0].item<double>(), -5, 1e-6);
  EXPECT_NEAR(decay[4].item<double>(), 3, 1e-6);
  EXPECT_NEAR(decay[2].item<double>(), -5 + 8 * std::pow(0.5, 0.7 + 1.3 * 2 / 3), 1e-6);
  const at::Tensor first = parameter(*rwkv, "time_first");
  for (const int64_t c : {0, 1, 2, 3})
    EXPECT_NEAR(first[c].item<double>(), std::log(0.3) + 0.5 * static_cast<double>((c + 1) % 3 - 1),
                1e-6);
  const auto mix = [&](const char* name) { return parameter(*rwkv, name)[0][0][3].item<double>(); };
  EXPECT_NEAR(mix("time_mix_key"), std::pow(0.6, 0.5), 1e-6);
  EXPECT_NEAR(mix("time_mix_value"), std::pow(0.6, 0.5) + 0.2, 1e-6);
  EXPECT_NEAR(mix("time_mix_receptance"), std::pow(0.6, 0.25), 1e-6);

  const auto mamba = make("mamba", 32, {{"state_size", 3}});
  const at::Tensor A_log = parameter(*mamba, "A_log");
  for (const int64_t s : {0, 1, 2})
    EXPECT_NEAR(A_log[7][s].item<double>(), std::log(static_cast<double>(s + 1)), 1e-6);
  const at::Tensor dt = at::softplus(parameter(*mamba, "dt_proj.bias"));
  EXPECT_GE(dt.min().item<double>(), 0.001 * 0.999);
  EXPECT_LE(dt.max().item<double>(), 0.1 * 1.001);
  EXPECT_LE(parameter(*mamba, "dt_proj.weight").abs().max().item<double>(), std::sqrt(0.5));

  const auto mamba2 = make("mamba2", 64, json::object());
  const at::Tensor A = parameter(*mamba2, "A_log").exp();
  EXPECT_TRUE(A.min().item<double>() >= 0.999 && A.max().item<double>() <= 16.001);
}

TEST(Options, ErrorsNameMixerRuleAndValue) {
  const auto error = [](const char* name, const json& options) -> std::string {
    try {
      make(name, 12, options);
    } catch (const UsageError& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error("mamba2", {{"head_dim", 5}}),
            "[mamba2] head_dim must divide expand * hidden_size (24), got 5");
  EXPECT_EQ(error("mamba2", {{"head_dim", 6}, {"n_groups", 3}}),
            "[mamba2] n_groups must divide the number of heads (4), got 3");
  EXPECT_EQ(error("s4d", {{"state_size", 5}}),
            "[s4d] state_size must be even (conjugate pairs), got 5");
  EXPECT_EQ(error("gated_attention", {{"num_heads", 3}, {"num_kv_heads", 2}}),
            "[gated_attention] num_kv_heads must divide num_heads (3), got 2");
  EXPECT_EQ(error("gated_attention", {{"partial_rotary_factor", 1.5}}),
            "[gated_attention] partial_rotary_factor must be in [0,1], got 1.5");
  EXPECT_EQ(error("gated_attention", {{"rope_theta", 0.0}}),
            "[gated_attention] rope_theta must be positive, got 0");
  EXPECT_THAT(error("mla", {{"kv_lora_rank", 0}}), HasSubstr("[mla] kv_lora_rank"));
  EXPECT_THAT(error("mamba", {{"state_size", 0}}), HasSubstr("[mamba] state_size"));
  EXPECT_THAT(error("lstm", {{"width", -1}}), HasSubstr("[lstm] width"));
  EXPECT_THAT(error("rwkv4", {{"attention_hidden_size", 0}}),
              HasSubstr("[rwkv4] attention_hidden_size"));
}

// The bytes of a decoding state follow from the sizes alone, and the cache of MLA is the latents.
TEST(States, Bytes) {
  const at::TensorOptions fp32(at::kFloat);
  const auto bytes = [&](const char* name, const json& options) {
    return make(name, 16, options)->zero_state(3, fp32).bytes();
  };
  EXPECT_EQ(bytes("mamba", {{"state_size", 5}}), 3 * 4 * (32 * 5 + 32 * 4));
  EXPECT_EQ(bytes("mamba2", {{"state_size", 6}, {"head_dim", 8}}),
            3 * 4 * (4 * 6 * 8 + (32 + 12) * 4));
  EXPECT_EQ(bytes("rwkv4", json::object()), 3 * 4 * (16 * 3 + 16));
  EXPECT_EQ(bytes("lstm", {{"width", 7}}), 3 * 4 * 14);
  EXPECT_EQ(bytes("s4d", {{"state_size", 8}}), 3 * 4 * 16 * 8);
  c10::NoGradGuard no_grad;
  const auto mla =
      make("mla", 16, {{"num_heads", 2}, {"qk_nope_head_dim", 8}, {"kv_lora_rank", 5}});
  State state = mla->zero_state(1, at::TensorOptions(at::kDouble));
  Context ctx;
  ctx.state = &state;
  mla->forward(at::randn({1, 16, 16}, at::kDouble), ctx);
  EXPECT_EQ(state.bytes(), 8 * (16 * (5 + 4) + 1));
}

}  // namespace
}  // namespace gdn
