// SPDX-License-Identifier: Apache-2.0
// The contract of mixer.h, tested for every registered mixer.
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <algorithm>
#include <functional>

#include "gdn/base/check.h"
#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

struct Case {
  std::string mixer, label;
  int64_t hidden_size;
  json options;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.mixer << "/" << c.label; }

// Every registered mixer with its default options and odd sizes, and more options for those that
// have interesting ones.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const MixerInfo& info : mixers()) {
    cases.push_back({info.name, "defaults", 12, json::object()});
    cases.push_back({info.name, "odd_width", 7, json::object()});
  }
  auto add = [&](const char* mixer, const char* label, int64_t hidden_size, json options) {
    cases.push_back({mixer, label, hidden_size, std::move(options)});
  };
  add("gated_delta_net", "grouped_values", 10,
      {{"head_dim", 3}, {"num_heads", 2}, {"num_v_heads", 4}, {"expand_v", 5.0 / 3}});
  add("gated_delta_net", "narrow_values_neg_eigval", 8,
      {{"head_dim", 6}, {"num_heads", 2}, {"expand_v", 0.5}, {"allow_neg_eigval", true}});
  add("gated_delta_net", "no_conv_no_gate", 8,
      {{"head_dim", 4}, {"num_heads", 2}, {"use_short_conv", false}, {"use_gate", false}});
  add("gated_delta_net", "erase_off_conv_bias", 8,
      {{"head_dim", 4}, {"erase", false}, {"conv_bias", true}, {"conv_size", 2}});
  add("gated_delta_net", "recurrent_wide_conv", 8,
      {{"head_dim", 4}, {"mode", "fused_recurrent"}, {"conv_size", 6}});
  add("delta_net", "sum_norm_elu", 8,
      {{"num_heads", 2}, {"qk_activation", "elu"}, {"qk_norm", "sum"}, {"use_gate", true}});
  add("delta_net", "relu_no_beta", 16,
      {{"num_heads", 2}, {"qk_activation", "relu"}, {"use_beta", false}, {"conv_bias", true}});
  add("delta_net", "identity_no_conv_neg_eigval", 8,
      {{"qk_activation", "identity"}, {"use_short_conv", false}, {"allow_neg_eigval", true}});
  add("delta_net", "narrow_keys_recurrent", 8,
      {{"num_heads", 2}, {"expand_k", 0.5}, {"expand_v", 2.0}, {"mode", "fused_recurrent"}});
  add("gated_delta_net", "sigmoid_gate", 8,
      {{"head_dim", 4}, {"output_gate_activation", "sigmoid"}});
  add("kimi_delta_attention", "safe_gate_grouped_values", 10,
      {{"head_dim", 3},
       {"num_heads", 2},
       {"num_v_heads", 4},
       {"expand_v", 5.0 / 3},
       {"safe_gate", true},
       {"lower_bound", -3.0}});
  add("kimi_delta_attention", "no_conv_neg_eigval", 8,
      {{"head_dim", 4}, {"num_heads", 2}, {"use_short_conv", false}, {"allow_neg_eigval", true}});
  add("gated_delta_net_2", "grouped_values_neg_eigval", 8,
      {{"head_dim", 3},
       {"num_heads", 2},
       {"num_v_heads", 4},
       {"allow_neg_eigval", true},
       {"safe_gate", true}});
  add("gated_delta_product", "three_steps_grouped_values", 8,
      {{"head_dim", 3},
       {"num_heads", 1},
       {"num_v_heads", 2},
       {"num_householder", 3},
       {"expand_v", 1.0},
       {"mode", "fused_recurrent"}});
  add("gated_delta_product", "one_step_no_gates", 8,
      {{"head_dim", 4},
       {"num_householder", 1},
       {"use_forget_gate", false},
       {"use_output_gate", false},
       {"use_short_conv", false},
       {"allow_neg_eigval", false}});
  add("gated_write", "by_head", 8, {{"head_dim", 4}, {"gate_shape", "scalar"}});
  add("gated_write", "by_key_channel", 8,
      {{"head_dim", 4},
       {"num_heads", 2},
       {"num_v_heads", 4},
       {"gate_shape", "key"},
       {"learning_rate", 1.5},
       {"use_gate", true}});
  add("gated_write", "plain_keys", 8,
      {{"head_dim", 4}, {"qk_norm", "none"}, {"learning_rate", 0.1}, {"conv_bias", true}});
  add("dplr", "free_grouped_values", 8,
      {{"head_dim", 3},
       {"num_heads", 2},
       {"num_v_heads", 4},
       {"low_rank", "free"},
       {"expand_v", 2.0}});
  add("dplr", "safe_gate_no_output_gate", 8,
      {{"head_dim", 4}, {"safe_gate", true}, {"use_gate", false}, {"use_short_conv", false}});
  add("rwkv7", "two_heads", 8,
      {{"head_dim", 4},
       {"decay_low_rank_dim", 3},
       {"a_low_rank_dim", 2},
       {"gate_low_rank_dim", 5}});
  add("linear_attention", "elu_normalised", 8,
      {{"num_heads", 2},
       {"feature_map", "elu"},
       {"do_feature_map_norm", true},
       {"norm_q", true},
       {"norm_k", true}});
  add("linear_attention", "performer_shared_keys", 8,
      {{"num_heads", 2},
       {"num_kv_heads", 1},
       {"feature_map", "performer"},
       {"num_features", 5},
       {"do_feature_map_norm", true},
       {"output_norm", "identity"}});
  add("linear_attention", "relu_recurrent", 16,
      {{"num_heads", 2}, {"feature_map", "relu"}, {"mode", "fused_recurrent"}});
  add("linear_attention", "tied_product", 8,
      {{"num_heads", 2}, {"tie_feature_map_qk", true}, {"expand_k", 2.0}});
  add("linear_attention", "identity", 8, {{"num_heads", 2}, {"feature_map", "identity"}});
  add("retention", "shared_keys_conv", 16,
      {{"num_heads", 4}, {"num_kv_heads", 2}, {"use_short_conv", true}, {"gate_fn", "sigmoid"}});
  add("retention", "no_positions_no_gate", 6,
      {{"num_heads", 2}, {"rope_theta", 0.0}, {"use_output_gate", false}, {"feature_map", "elu"}});
  add("simple_gla", "shared_keys_no_conv", 8,
      {{"num_heads", 4},
       {"num_kv_heads", 2},
       {"use_short_conv", false},
       {"gate_logit_normalizer", 2}});
  add("gla", "shared_keys_conv", 8,
      {{"num_heads", 2},
       {"num_kv_heads", 1},
       {"use_short_conv", true},
       {"clamp_min", -0.05},
       {"gate_low_rank_dim", 3}});
  add("attention", "grouped_queries", 16,
      {{"num_heads", 4}, {"num_kv_heads", 2}, {"qkv_bias", true}, {"qk_norm", true}});
  add("attention", "window", 8, {{"num_heads", 2}, {"window_size", 3}});
  add("attention", "window_two_no_positions", 6,
      {{"head_dim", 5}, {"num_heads", 3}, {"window_size", 2}, {"rope_theta", 0.0}});
  add("attention", "window_grouped", 8,
      {{"num_heads", 2}, {"num_kv_heads", 1}, {"window_size", 5}, {"rope_theta", 100.0}});
  add("mamba2", "groups", 8,
      {{"head_dim", 4}, {"n_groups", 2}, {"state_size", 5}, {"conv_size", 3}, {"use_bias", true}});
  add("mamba2", "one_norm_recurrent", 6,
      {{"head_dim", 3},
       {"n_groups", 2},
       {"norm_groups", 1},
       {"state_size", 4},
       {"mode", "fused_recurrent"},
       {"conv_bias", false}});
  add("gated_attention", "grouped_queries", 8,
      {{"num_heads", 4}, {"num_kv_heads", 2}, {"head_dim", 8}, {"attention_bias", true}});
  add("gated_attention", "no_rotation", 6, {{"head_dim", 3}, {"partial_rotary_factor", 0.0}});
  add("mla", "query_rank", 12,
      {{"num_heads", 3}, {"qk_nope_head_dim", 4}, {"v_head_dim", 5}, {"q_lora_rank", 6}});
  add("mla", "not_absorbed_no_shared_keys", 8,
      {{"num_heads", 2}, {"qk_rope_head_dim", 0}, {"absorb", false}, {"attention_bias", true}});
  add("mamba", "signed_transitions", 8, {{"allow_neg_eigval", true}, {"state_size", 5}});
  add("mamba", "no_biases_wide", 6,
      {{"expand", 3}, {"conv_bias", false}, {"conv_size", 2}, {"time_step_rank", 3}});
  add("mamba", "all_biases", 8, {{"use_bias", true}, {"state_size", 3}});
  add("lstm", "wide_no_bias", 6, {{"width", 9}, {"bias", false}});
  add("s4d", "few_states", 5, {{"state_size", 4}});
  add("rwkv4", "wide", 8, {{"attention_hidden_size", 12}});
  add("ttt_linear", "gate_shared_qk_batch5", 8,
      {{"num_heads", 2}, {"use_gate", true}, {"share_qk", true}, {"mini_batch_size", 5}});
  add("ttt_linear", "plain", 8,
      {{"num_heads", 2},
       {"inner_norm", false},
       {"inner_bias", false},
       {"rope_theta", 0.0},
       {"mini_batch_size", 4}});
  add("ttt_mlp", "batch4", 8,
      {{"num_heads", 2}, {"mini_batch_size", 4}, {"expansion", 1.5}, {"norm_eps", 0.01}});
  add("titans_lmm", "linear", 8, {{"head_dim", 4}, {"memory_depth", 1}});
  add("titans_lmm", "linear_chunk4_before", 8,
      {{"head_dim", 4},
       {"memory_depth", 1},
       {"chunk_size", 4},
       {"read", "before"},
       {"decay_to", "start"},
       {"use_short_conv", false},
       {"use_gate", false}});
  add("titans_lmm", "depth3_norm_gelu_bias", 8,
      {{"head_dim", 4},
       {"memory_depth", 3},
       {"expansion", 1.5},
       {"memory_norm", true},
       {"norm_eps", 0.01},
       {"memory_activation", "gelu"},
       {"memory_bias", true},
       {"chunk_size", 5},
       {"inner_loss", "mean"},
       {"qk_norm", false}});
  add("titans_lmm", "chunk_rates_clip_no_momentum", 8,
      {{"head_dim", 4},
       {"expansion", 2.0},
       {"chunk_size", 4},
       {"rates", "chunk"},
       {"inner_clip", 0.5},
       {"momentum", false},
       {"decay_to", "zero"}});
  add("titans_lmm", "token_chunks_stable_no_forgetting", 8,
      {{"head_dim", 4},
       {"expansion", 1.0},
       {"chunk_size", 1},
       {"theta_scale", "stable"},
       {"forgetting", false},
       {"inner_loss", "half"}});
  const json small = {{"head_dim", 4}, {"expansion", 1.0}, {"chunk_size", 4}};
  auto with = [&](json options) {
    options.update(small);
    return options;
  };
  add("titans_mag", "window3", 8, with({{"window_size", 3}, {"gate", "both"}}));
  add("titans_mag", "no_persistent_product", 8,
      with({{"persistent_tokens", 0}, {"gate", "product"}, {"gate_activation", "silu"}}));
  add("titans_mal", "window5", 8, with({{"window_size", 5}, {"persistent_tokens", 3}}));
  add("titans_mal", "no_persistent", 8, with({{"persistent_tokens", 0}, {"rope_theta", 0.0}}));
  add("titans_mac", "segment8_delay4", 8, with({{"segment_size", 8}, {"read_delay", 4}}));
  add("titans_mac", "token_delay_no_persistent", 8,
      with({{"segment_size", 6}, {"read_delay", 1}, {"persistent_tokens", 0}}));
  add("titans_mac", "linear_segment4", 8,
      {{"head_dim", 4}, {"memory_depth", 1}, {"segment_size", 4}});
  return cases;
}

class Contract : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(7);
    mixer_ = make(GetParam().options);
    mixer_->to(at::kDouble);
  }

  std::shared_ptr<Mixer> make(const json& options) const {
    MixerArgs args;
    args.hidden_size = D();
    args.options = options;
    const auto mixer = make_mixer(GetParam().mixer, args);
    // What starts as zero shuts off what comes before it: give it values, so that it is seen.
    c10::NoGradGuard no_grad;
    for (const auto& p : mixer->named_parameters())
      if (!p.value().any().item<bool>()) p.value().normal_(0, 0.2);
    return mixer;
  }

  int64_t D() const { return GetParam().hidden_size; }
  at::Tensor input(int64_t B, int64_t T) const { return at::randn({B, T, D()}, at::kDouble); }
  at::Tensor run(const at::Tensor& x, const Context& ctx = {}) { return mixer_->forward(x, ctx); }
  State zero_state(int64_t sequences) const {
    return mixer_->zero_state(sequences, at::TensorOptions(at::kDouble));
  }

  std::shared_ptr<Mixer> mixer_;
};

Context with_state(State& state) {
  Context ctx;
  ctx.state = &state;
  return ctx;
}

Context packed(std::vector<int64_t> ends) {
  Context ctx;
  ctx.seqs.cu_seqlens = at::tensor(ends, at::kLong);
  return ctx;
}

void expect_near(const at::Tensor& actual, const at::Tensor& expected, double tolerance = 1e-9,
                 const std::string& what = "") {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type()) << what;
  if (actual.numel() == 0) return;
  const double error = (actual - expected).abs().max().item<double>();
  EXPECT_LE(error, tolerance) << what;
}

// Entries may differ in layout (a cache that grew otherwise), so states are compared by what they
// do: the outputs for the same next tokens.
void expect_same_future(Mixer& mixer, State a, State b, int64_t D) {
  c10::NoGradGuard no_grad;
  ASSERT_EQ(a.num_sequences(), b.num_sequences());
  a = a.clone();
  b = b.clone();
  const at::Tensor next = at::randn({a.num_sequences(), 9, D}, at::kDouble);
  expect_near(mixer.forward(next, with_state(a)), mixer.forward(next, with_state(b)));
}

TEST_P(Contract, ShapeAndFiniteness) {
  const at::Tensor x = input(2, 5);
  const at::Tensor y = run(x);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_TRUE(y.isfinite().all().item<bool>());
  EXPECT_GT(y.abs().max().item<double>(), 1e-4);
  EXPECT_EQ(run(input(2, 0)).sizes(), (std::vector<int64_t>{2, 0, D()}));
}

TEST_P(Contract, EqualsItsNaiveForm) {
  for (const int64_t T : {1, 2, 17, 70, 131}) {
    const at::Tensor x = input(2, T);
    for (const bool grad : {false, true}) {  // layers may choose another form with gradients
      c10::AutoGradMode mode(grad);
      mixer_->use_naive(true);
      const at::Tensor expected = run(x);
      mixer_->use_naive(false);
      expect_near(run(x), expected, 1e-9, str_cat("T=", T, " grad=", grad));
    }
  }
}

TEST_P(Contract, SplitAnywhereEqualsWhole) {
  const int64_t T = 11;
  const at::Tensor x = input(2, T);
  for (const bool grad : {false, true}) {
    c10::AutoGradMode mode(grad);
    const at::Tensor whole = run(x);
    State all = zero_state(2);
    expect_near(run(x, with_state(all)), whole);
    for (int64_t cut = 0; cut <= T; ++cut) {
      State state = zero_state(2);
      const at::Tensor first = run(x.narrow(1, 0, cut), with_state(state));
      const at::Tensor second = run(x.narrow(1, cut, T - cut), with_state(state));
      expect_near(at::cat({first, second}, 1), whole, 1e-9, str_cat("cut at ", cut));
      expect_same_future(*mixer_, state, all, D());
    }
  }
}

TEST_P(Contract, TokenByTokenEqualsWhole) {
  const int64_t T = 40;  // beyond the first growth of a cache
  const at::Tensor x = input(2, T);
  for (const bool grad : {false, true}) {
    c10::AutoGradMode mode(grad);
    const at::Tensor whole = run(x);
    State state = zero_state(2);
    std::vector<at::Tensor> steps;
    for (int64_t t = 0; t < T; ++t) steps.push_back(run(x.narrow(1, t, 1), with_state(state)));
    expect_near(at::cat(steps, 1), whole);
  }
}

TEST_P(Contract, StateIsChangedInPlaceOnlyWithoutGradients) {
  const at::Tensor x = input(2, 3);
  State state = zero_state(2);
  run(x, with_state(state));  // parameters require gradients
  bool carries = false;
  for (const auto& entry : state.entries()) carries = carries || entry.second.requires_grad();
  EXPECT_TRUE(carries);
  const State before = state, copy = state.clone();
  run(x, with_state(state));
  for (const auto& [name, value] : before.entries()) expect_near(value, copy[name], 0, name);

  c10::NoGradGuard no_grad;
  State fixed = state.detach();
  run(input(2, 40), with_state(fixed));
  run(input(2, 1), with_state(fixed));  // a cache has grown and has room now
  const State handles = fixed;
  run(input(2, 1), with_state(fixed));
  for (const auto& [name, value] : handles.entries())
    EXPECT_EQ(value.data_ptr(), fixed[name].data_ptr()) << name;
}

TEST_P(Contract, PackedEqualsSeparate) {
  const std::vector<int64_t> ends = {0, 3, 3, 4, 21, 26};
  const auto N = static_cast<int64_t>(ends.size()) - 1;
  const at::Tensor x = input(1, ends.back()), more = input(1, ends.back());
  for (const bool grad : {false, true}) {
    c10::AutoGradMode mode(grad);
    std::vector<at::Tensor> outs, more_outs;
    State packed_state = zero_state(N);
    for (int64_t n = 0; n < N; ++n) {
      State state = zero_state(1);
      outs.push_back(run(x.slice(1, ends[n], ends[n + 1]), with_state(state)));
      more_outs.push_back(run(more.slice(1, ends[n], ends[n + 1]), with_state(state)));
    }
    Context ctx = packed(ends);
    expect_near(run(x, ctx), at::cat(outs, 1));
    ctx.state = &packed_state;
    expect_near(run(x, ctx), at::cat(outs, 1));
    expect_near(run(more, ctx), at::cat(more_outs, 1));  // from different positions
    // Without segments a sequence goes on from where its part of the packed row ended.
    State third = packed_state.index(at::tensor({3}, at::kLong));
    State alone = zero_state(1);
    run(at::cat({x.slice(1, 4, 21), more.slice(1, 4, 21)}, 1), with_state(alone));
    expect_same_future(*mixer_, third, alone, D());
  }
}

TEST_P(Contract, ChangingATokenChangesNothingBefore) {
  const int64_t T = 20;
  const at::Tensor x = input(1, T), y = run(x);
  for (const int64_t t : {0, 1, 9, 19}) {
    at::Tensor changed = x.clone();
    changed.select(1, t).add_(1.0);
    const at::Tensor z = run(changed);
    if (t > 0) expect_near(z.narrow(1, 0, t), y.narrow(1, 0, t), 1e-12);
    EXPECT_GT((z - y).select(1, t).abs().max().item<double>(), 1e-6) << t;
  }
}

TEST_P(Contract, SequencesOfABatchAreIndependent) {
  const at::Tensor x = input(3, 13), y = run(x);
  for (int64_t b = 0; b < 3; ++b) expect_near(run(x.narrow(0, b, 1)), y.narrow(0, b, 1), 1e-10);
  at::Tensor changed = x.clone();
  changed.select(0, 1).add_(1.0);
  const at::Tensor z = run(changed);
  expect_near(z.select(0, 0), y.select(0, 0), 1e-10);
  expect_near(z.select(0, 2), y.select(0, 2), 1e-10);
}

TEST_P(Contract, SlotsAddressAPool) {
  c10::NoGradGuard no_grad;
  const at::Tensor x = input(2, 6), steps = input(2, 8);
  State expected = zero_state(2), pool = zero_state(5);
  std::vector<at::Tensor> expected_outs = {run(x, with_state(expected))};
  Context ctx = with_state(pool);
  // Another sequence lives in slot 3, further on than the others.
  ctx.slots = at::tensor({3}, at::kLong);
  run(input(1, 21), ctx);
  const State neighbour = pool.clone();
  ctx.slots = at::tensor({4, 1}, at::kLong);
  std::vector<at::Tensor> outs = {run(x, ctx)};
  for (int64_t t = 0; t < 8; ++t) {
    expected_outs.push_back(run(steps.narrow(1, t, 1), with_state(expected)));
    outs.push_back(run(steps.narrow(1, t, 1), ctx));
  }
  expect_near(at::cat(outs, 1), at::cat(expected_outs, 1));
  expect_same_future(*mixer_, pool.index(ctx.slots), expected, D());
  const at::Tensor others = at::tensor({0, 2, 3}, at::kLong);
  expect_same_future(*mixer_, pool.index(others), neighbour.index(others), D());

  // A negative slot holds no sequence: nothing happens for it, and its neighbours do not notice.
  const at::Tensor next = input(2, 1);
  const at::Tensor y = run(next, with_state(expected));
  ctx.slots = at::tensor({4, -1, 1}, at::kLong);
  const at::Tensor z =
      run(at::cat({next.narrow(0, 0, 1), input(1, 1), next.narrow(0, 1, 1)}, 0), ctx);
  expect_near(at::cat({z.narrow(0, 0, 1), z.narrow(0, 2, 1)}, 0), y);
  expect_same_future(*mixer_, pool.index(others), neighbour.index(others), D());
}

TEST_P(Contract, AZeroedRowIsAFreshSequence) {
  c10::NoGradGuard no_grad;
  State state = zero_state(2);
  run(input(2, 9), with_state(state));
  const State fresh = zero_state(1);
  for (const auto& [name, value] : state.entries()) state[name].select(0, 1).zero_();
  Context ctx = with_state(state);
  ctx.slots = at::tensor({1}, at::kLong);
  const at::Tensor x = input(1, 4);
  expect_near(run(x, ctx), run(x));
}

// d/dp of loss() by central differences at one element.
double numeric_gradient(at::Tensor p, int64_t i, const std::function<at::Tensor()>& loss) {
  c10::NoGradGuard no_grad;
  constexpr double kStep = 1e-5;
  double* x = p.mutable_data_ptr<double>() + i;
  const double before = *x;
  *x = before + kStep;
  const double up = loss().item<double>();
  *x = before - kStep;
  const double down = loss().item<double>();
  *x = before;
  return (up - down) / (2 * kStep);
}

// Compares autograd's gradients of loss() with differences at a few elements of each tensor.
void check_gradients(const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                     const std::function<at::Tensor()>& loss) {
  std::vector<at::Tensor> inputs;
  for (const auto& entry : tensors) inputs.push_back(entry.second);
  const auto grads = torch::autograd::grad({loss()}, inputs);
  for (size_t n = 0; n < inputs.size(); ++n) {
    ASSERT_TRUE(grads[n].defined()) << tensors[n].first;
    const at::Tensor grad = grads[n].contiguous();
    const int64_t size = inputs[n].numel(), stride = std::max<int64_t>(1, size / 5);
    double sum = 0;
    for (int64_t i = 0; i < size; i += stride) {
      const double numeric = numeric_gradient(inputs[n], i, loss);
      EXPECT_NEAR(grad.const_data_ptr<double>()[i], numeric, 2e-6 * (1 + std::abs(numeric)))
          << tensors[n].first << "[" << i << "]";
      sum += std::abs(numeric);
    }
    EXPECT_GT(sum, 0) << tensors[n].first << " has no influence";
  }
}

// The LayerNorm inside a memory, over weights that start near zero, bends so much that differences
// say nothing about gradients; with larger weights they do.
void enlarge_small_starts(Mixer& mixer) {
  c10::NoGradGuard no_grad;
  for (const auto& p : mixer.named_parameters()) {
    const bool weight = p.key().find("start.W") != std::string::npos;
    if (weight && p.value().abs().max().item<double>() < 0.2) p.value().mul_(25);
  }
}

TEST_P(Contract, GradientsEqualDifferences) {
  enlarge_small_starts(*mixer_);
  const int64_t T = 7;
  at::Tensor x = input(2, T).requires_grad_();
  const at::Tensor w = input(2, T);
  std::vector<std::pair<std::string, at::Tensor>> tensors = {{"x", x}};
  for (const auto& p : mixer_->named_parameters()) tensors.emplace_back(p.key(), p.value());
  check_gradients(tensors, [&] { return (run(x) * w).sum(); });
  // Packed, with an empty sequence.
  at::Tensor row = input(1, T).requires_grad_();
  const Context ctx = packed({0, 4, 4, 7});
  check_gradients({{"x", row}}, [&] { return (run(row, ctx) * w.narrow(0, 0, 1)).sum(); });
}

TEST_P(Contract, GradientsCrossASplit) {
  enlarge_small_starts(*mixer_);
  const int64_t T = 9, cut = 4;
  at::Tensor x = input(2, T).requires_grad_();
  const at::Tensor w = input(2, T - cut);
  State start = zero_state(2);
  {
    c10::NoGradGuard no_grad;
    run(input(2, 5), with_state(start));
  }
  std::vector<std::pair<std::string, at::Tensor>> tensors = {{"x", x}};
  for (const auto& p : mixer_->named_parameters()) tensors.emplace_back(p.key(), p.value());
  for (const auto& [name, value] : start.entries())
    if (value.is_floating_point() && value.numel() > 0)
      tensors.emplace_back("state " + name, value.requires_grad_());
  // Only the second part is looked at: x's first part acts through the state alone.
  const auto loss = [&] {
    State state = start;
    // Differences are taken without gradients, where a state is changed in place.
    if (!c10::GradMode::is_enabled()) state = start.clone();
    run(x.narrow(1, 0, cut), with_state(state));
    return (run(x.narrow(1, cut, T - cut), with_state(state)) * w).sum();
  };
  std::vector<at::Tensor> inputs;
  for (auto& entry : tensors) inputs.push_back(entry.second);
  const auto grads = torch::autograd::grad({loss()}, inputs, {}, std::nullopt, false, true);
  for (size_t n = 0; n < inputs.size(); ++n) {
    const int64_t size = inputs[n].numel(), stride = std::max<int64_t>(1, size / 5);
    for (int64_t i = 0; i < size; i += stride) {
      const double numeric = numeric_gradient(inputs[n], i, loss);
      const double exact =
          grads[n].defined() ? grads[n].contiguous().const_data_ptr<double>()[i] : 0.0;
      EXPECT_NEAR(exact, numeric, 2e-6 * (1 + std::abs(numeric)))
          << tensors[n].first << "[" << i << "]";
    }
  }
  EXPECT_GT(grads[0].narrow(1, 0, cut).abs().max().item<double>(), 1e-6);
}

TEST_P(Contract, ComputesInTheDtypeOfItsInput) {
  const at::Tensor x = input(2, 33);
  const at::Tensor expected = run(x);
  mixer_->to(at::kFloat);
  const double size = expected.abs().max().item<double>();
  const at::Tensor y32 = run(x.to(at::kFloat));
  EXPECT_EQ(y32.scalar_type(), at::kFloat);
  expect_near(y32.to(at::kDouble), expected, 1e-4 * size);
  // bf16 over fp32 parameters, and its decoding steps.
  const at::Tensor x16 = x.to(at::kBFloat16), y16 = run(x16);
  EXPECT_EQ(y16.scalar_type(), at::kBFloat16);
  EXPECT_LE((y16.to(at::kDouble) - expected).norm().item<double>(),
            0.05 * expected.norm().item<double>());
  c10::NoGradGuard no_grad;
  State state = mixer_->zero_state(2, at::TensorOptions(at::kBFloat16));
  std::vector<at::Tensor> steps;
  for (int64_t t = 0; t < 33; ++t) steps.push_back(run(x16.narrow(1, t, 1), with_state(state)));
  EXPECT_EQ(steps[0].scalar_type(), at::kBFloat16);
  EXPECT_LE((at::cat(steps, 1).to(at::kDouble) - expected).norm().item<double>(),
            0.05 * expected.norm().item<double>());
}

TEST_P(Contract, ParametersAreTheWholeModel) {
  const at::Tensor x = input(2, 9);
  const auto other = make(GetParam().options);
  other->to(at::kDouble);
  EXPECT_GT((other->forward(x, {}) - run(x)).abs().max().item<double>(), 1e-6);
  const auto from = mixer_->named_parameters();
  auto to = other->named_parameters();
  ASSERT_EQ(from.size(), to.size());
  EXPECT_TRUE(mixer_->named_buffers().is_empty());
  c10::NoGradGuard no_grad;
  for (const auto& p : from) to[p.key()].copy_(p.value());
  expect_near(other->forward(x, {}), run(x), 0);
}

TEST_P(Contract, InitialisationFollowsTheSeed) {
  for (const auto& p : mixer_->named_parameters())
    EXPECT_TRUE(p.value().isfinite().all().item<bool>()) << p.key();
  torch::manual_seed(7);
  const auto again = make(GetParam().options);
  const auto expected = mixer_->named_parameters();
  for (const auto& p : again->named_parameters()) {
    EXPECT_EQ(p.value().scalar_type(), at::kFloat) << p.key();
    expect_near(p.value().to(at::kDouble), expected[p.key()], 0, p.key());
  }
}

TEST_P(Contract, RejectsMisuse) {
  auto error = [](const std::function<void()>& f) -> std::string {
    try {
      f();
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const std::string bracket = "[" + GetParam().mixer + "]";
  const at::Tensor x = input(2, 4);
  EXPECT_THAT(error([&] { run(x.select(0, 0)); }),
              AllOf(HasSubstr(bracket), HasSubstr("x must be [B,T,D]")));
  EXPECT_THAT(error([&] {
                run(x, packed({0, 4}));
              }),
              AllOf(HasSubstr(bracket), HasSubstr("B must be 1 with cu_seqlens, got 2")));
  State state = zero_state(3);
  EXPECT_THAT(error([&] { run(x, with_state(state)); }),
              AllOf(HasSubstr(bracket), HasSubstr("must hold 2 sequences, got 3")));
  Context ctx = with_state(state);
  ctx.slots = at::tensor({0, 1}, at::kLong);
  EXPECT_THAT(error([&] { run(x, ctx); }),
              AllOf(HasSubstr(bracket), HasSubstr("slots are not for gradients")));
  c10::NoGradGuard no_grad;
  ctx.slots = at::tensor({0, 3}, at::kLong);
  EXPECT_THAT(error([&] { run(x, ctx); }), HasSubstr("below the number of slots, 3, got 3"));
  ctx.slots = at::tensor({0, -1}, at::kLong);
  EXPECT_THAT(error([&] { run(x, ctx); }), HasSubstr("negative slots are for decoding steps"));
  ctx.state = nullptr;
  EXPECT_THAT(error([&] { run(x, ctx); }), HasSubstr("slots need a state"));
}

INSTANTIATE_TEST_SUITE_P(EveryMixer, Contract, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) {
                           return info.param.mixer + "_" + info.param.label;
                         });

}  // namespace
}  // namespace gdn
