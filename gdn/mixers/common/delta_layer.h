// SPDX-License-Identifier: Apache-2.0
// What the mixers on the delta-rule engine share: the sizes of their heads and the options that
// give them, the convolutions over q, k and v, decays and write strengths, the call of the engine
// with a state, and the normed and gated output. A mixer is put together from these.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/mixers/common/modules.h"
#include "gdn/mixers/common/options.h"
#include "gdn/mixers/common/state_access.h"
#include "gdn/ops/delta_rule.h"

namespace gdn {

// --- Sizes and options ---

struct HeadSizes {
  int64_t H, HV;  // heads of queries and keys; of values
  int64_t K, V;   // sizes of a key and of a value

  int64_t key_dim() const { return H * K; }
  int64_t value_dim() const { return HV * V; }
};

// From the options head_dim, num_heads, num_v_heads and expand_v. `share` of the width is what the
// keys of the default number of heads make up.
HeadSizes sizes_by_head_dim(const Options& options, int64_t hidden_size, double share);
std::vector<MixerOption> head_dim_options(double share, double expand_v);

// From the options num_heads, expand_k and expand_v, the widths of all heads divided by
// hidden_size.
HeadSizes sizes_by_width(const Options& options, int64_t hidden_size);
// The default of expand_k may be derived (null): 0.5, or 1 where hidden_size is odd.
std::vector<MixerOption> width_options(MixerOption expand_k, double expand_v);
MixerOption expand_k_option(double expand_k);

// From the option num_kv_heads: heads of keys and values, each for a group of query heads.
int64_t kv_heads(const Options& options, int64_t num_heads);
MixerOption kv_heads_option();

// Options that several mixers have.
MixerOption mode_option();                              // "mode", see delta_rule_form
MixerOption norm_eps_option();                          // "norm_eps"
MixerOption neg_eigval_option(bool on = false);         // "allow_neg_eigval"
std::vector<MixerOption> conv_options(bool on = true);  // of QkvConvolution

std::vector<MixerOption> joined(std::initializer_list<std::vector<MixerOption>> parts);

// The default head_dim of a mixer whose state is a matrix: an eighth of the width rounded down to a
// power of two, from 64 to 256, and no more than the width.
int64_t default_head_dim(int64_t hidden_size);

// --- Parts ---

// Makes the Linear and registers it.
std::shared_ptr<Linear> add_linear(torch::nn::Module& owner, const char* name, int64_t in_features,
                                   int64_t out_features, bool with_bias = false);

// Two Linear maps in a row, named "0" and "1" as in torch.nn.Sequential; only the second may have a
// bias.
class LowRank : public torch::nn::Module {
 public:
  LowRank(int64_t in_features, int64_t rank, int64_t out_features, bool with_bias);
  at::Tensor forward(const at::Tensor& x /* [...,in] */);  // [...,out]

 private:
  std::shared_ptr<Linear> down_, up_;
};

// The causal convolutions q_conv1d, k_conv1d and v_conv1d with their activations, or, where
// use_short_conv is false, the bare activations (nothing without bare_activation). Their states are
// conv_q, conv_k and conv_v.
class QkvConvolution {
 public:
  struct Widths {
    int64_t q, k, v;
  };
  // Registers what the options use_short_conv, conv_size and conv_bias ask for.
  QkvConvolution(torch::nn::Module& owner, const Options& options, Widths widths,
                 Activation qk = Activation::kSilu, Activation v = Activation::kSilu,
                 bool bare_activation = true);

  void forward(at::Tensor& q, at::Tensor& k, at::Tensor& v /* [B,T,width] */, StateAccess& state,
               bool naive) const;
  void add_zero_state(State& state, int64_t sequences, const at::TensorOptions& options) const;
  bool convolves() const { return q_ != nullptr; }

 private:
  std::shared_ptr<ShortConvolution> q_, k_, v_;
  Activation qk_activation_, v_activation_;
};

// beta = sigmoid(b), times 2 with allow_neg_eigval, in the dtype that the engine takes.
at::Tensor write_strength(const at::Tensor& b, bool allow_neg_eigval, bool naive);

// g = -exp(A_log) softplus(a + dt_bias) with the parameters A_log and dt_bias [heads]. They start
// as the logarithm of U(0,16) and as the inverse softplus of a step that is log-uniform in
// [0.001,0.1].
class ScalarDecay {
 public:
  ScalarDecay() = default;
  ScalarDecay(torch::nn::Module& owner, int64_t heads);
  at::Tensor forward(const at::Tensor& a /* [B,T,heads] */, bool naive) const;

 private:
  at::Tensor A_log_, dt_bias_;
};

// The same per key channel, with A_log [heads] and dt_bias [heads K]; A starts as U(1,16). With the
// option safe_gate, g = lower_bound sigmoid(exp(A_log) (f + dt_bias)), and A_log starts as 0.
class ChannelDecay {
 public:
  ChannelDecay() = default;
  ChannelDecay(torch::nn::Module& owner, const Options& options, int64_t heads, int64_t channels);
  // [B,T,heads,K]
  at::Tensor forward(const at::Tensor& f /* [B,T,heads K] */, bool naive) const;

 private:
  at::Tensor A_log_, dt_bias_;  // [heads], [heads K]
  std::optional<double> lower_bound_;
};

std::vector<MixerOption> safe_gate_options();

// ChannelDecay of the low-rank projection f_proj of a layer's input.
class LowRankDecay {
 public:
  LowRankDecay() = default;
  // Registers f_proj.
  LowRankDecay(torch::nn::Module& owner, const HeadSizes& sizes, int64_t hidden_size);
  // Registers A_log and dt_bias, which stand behind other parameters.
  void add_parameters(torch::nn::Module& owner, const Options& options, const HeadSizes& sizes);
  at::Tensor forward(const at::Tensor& x /* [B,T,D] */, bool naive) const;  // [B,T,HV,K]

 private:
  std::shared_ptr<LowRank> f_proj_;
  ChannelDecay decay_;
};

// The options of layers with such a decay, a beta and a normed output.
std::vector<MixerOption> low_rank_decay_options(double share);

// "relu", "elu" (plus 1, so that it is positive), "silu" or "identity", by elements.
at::Tensor feature_map(std::string_view name, const at::Tensor& x);

// x / sqrt(sum x^2 + 1e-6) over the last dimension.
at::Tensor l2norm(const at::Tensor& x, bool naive);

// --- The engine ---

// The inputs of one call; see gdn/ops/delta_rule.h.
struct DeltaInputs {
  at::Tensor q, k, v;           // [B,T,H,K], [B,T,H,K], [B,T,HV,V]
  ops::OptionalTensor g, beta;  // [B,T,HV] or [B,T,HV,K]; [B,T,HV]
  std::string_view erase = "key";
  ops::OptionalTensor a, p;     // [B,T,H,K]
  std::optional<double> scale;  // absent: K^-0.5
  // Above 1 the engine's tokens are steps of which this many make one token: T is steps times that
  // of o, and o is what the last step reads.
  int64_t steps = 1;
  bool qk_l2norm = false;  // the engine divides rows of q and k by their length first
};

// Rows of q and k get length 1: in the engine, or with naive in its definition.
void normalize_qk(DeltaInputs& in, bool naive);

// o [B,T,HV,V], from and to the entry "recurrent" where the call has a state. form: "chunk",
// "recurrent" or "naive"; a decoding step always works in place on the pool.
at::Tensor run_delta_rule(const DeltaInputs& in, std::string_view form, StateAccess& state);

// The form for T tokens: "naive"; or what `mode` ("chunk", "fused_recurrent") says, but that short
// inputs without gradients are always taken token by token.
const char* delta_rule_form(std::string_view mode, int64_t T, bool naive);

// [N,HV,K,V] in the dtype that states have for activations of `options`.
at::Tensor zero_recurrent_state(int64_t sequences, const HeadSizes& sizes,
                                const at::TensorOptions& options);

// --- The output ---

// y = o_proj(RMSNorm(o) * act(gate)), the norm over each head.
class HeadOutput {
 public:
  struct Config {
    const char* norm_name = "o_norm";  // null: no norm (and no gate)
    std::string gate;       // activation of g_proj(x): "silu" (or "swish"), "sigmoid"; "": no gate
    int64_t gate_rank = 0;  // > 0: g_proj is a LowRank map with a bias
  };
  HeadOutput(torch::nn::Module& owner, int64_t hidden_size, const HeadSizes& sizes, double norm_eps,
             Config config);
  at::Tensor forward(const at::Tensor& o /* [B,T,HV,V] */, const at::Tensor& x /* [B,T,D] */,
                     bool naive) const;  // [B,T,D]

 private:
  std::string gate_;
  std::shared_ptr<Linear> g_proj_, o_proj_;
  std::shared_ptr<LowRank> low_rank_;
  std::shared_ptr<RmsNorm> norm_;
};

}  // namespace gdn
