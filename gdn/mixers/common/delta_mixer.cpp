// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/delta_mixer.h"

#include <vector>

namespace gdn {

DeltaMixer::DeltaMixer(const char* name, const MixerArgs& args)
    : name_(name), mode_(Options(name, args).text("mode", {"chunk", "fused_recurrent"})) {}

void DeltaMixer::add_qkv(int64_t hidden_size, int64_t steps) {
  steps_ = steps;
  const int64_t kv_heads = num_kv_heads_ > 0 ? num_kv_heads_ : sizes_.H;
  const int64_t v_heads = num_kv_heads_ > 0 ? num_kv_heads_ : sizes_.HV;
  q_proj_ = add_linear(*this, "q_proj", hidden_size, sizes_.key_dim());
  k_proj_ = add_linear(*this, "k_proj", hidden_size, kv_heads * sizes_.K * steps);
  v_proj_ = add_linear(*this, "v_proj", hidden_size, v_heads * sizes_.V * steps);
}

void DeltaMixer::add_convolution(const Options& options, Activation qk, Activation v,
                                 bool bare_activation) {
  const auto width = [](const Linear& linear) { return linear.weight.size(0); };
  convolution_.emplace(*this, options,
                       QkvConvolution::Widths{width(*q_proj_), width(*k_proj_), width(*v_proj_)},
                       qk, v, bare_activation);
}

void DeltaMixer::add_output(const Options& options, const MixerArgs& args,
                            HeadOutput::Config config) {
  output_.emplace(*this, args.hidden_size, sizes_, options.number_or("norm_eps", args.norm_eps),
                  std::move(config));
}

State DeltaMixer::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  state.set("recurrent", zero_recurrent_state(sequences, state_sizes(), options));
  if (convolution_) convolution_->add_zero_state(state, sequences, options);
  return state;
}

DeltaInputs DeltaMixer::project(const at::Tensor& x, StateAccess& state) const {
  const int64_t B = x.size(0), T = x.size(1);
  std::vector<at::Tensor> qkv = forward_all(x, {q_proj_.get(), k_proj_.get(), v_proj_.get()});
  at::Tensor &q = qkv[0], &k = qkv[1], &v = qkv[2];
  if (convolution_) convolution_->forward(q, k, v, state, naive_);
  DeltaInputs in;
  in.q = q.view({B, T, sizes_.H, sizes_.K});
  if (num_kv_heads_ > 0 && num_kv_heads_ < sizes_.H) {
    const int64_t group = sizes_.H / num_kv_heads_;
    in.k = k.view({B, T, num_kv_heads_, sizes_.K}).repeat_interleave(group, 2);
    in.v = v.view({B, T, num_kv_heads_, sizes_.V}).repeat_interleave(group, 2);
  } else {
    in.k = k.view({B, T * steps_, sizes_.H, sizes_.K});
    in.v = v.view({B, T * steps_, sizes_.HV, sizes_.V});
  }
  return in;
}

at::Tensor DeltaMixer::output(const at::Tensor& o, const at::Tensor& x) {
  return output_->forward(o, x, naive_);
}

at::Tensor DeltaMixer::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(name_, x, ctx, *this);
  const DeltaInputs in = inputs(x, state);
  return output(run_delta_rule(in, delta_rule_form(mode_, x.size(1), naive_), state), x);
}

}  // namespace gdn
