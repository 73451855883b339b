// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/titans/layer.h"

#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <vector>

#include "gdn/ops/common.h"

namespace gdn {
namespace {

template <typename MixerClass>
std::shared_ptr<Mixer> make(const MixerArgs& args) {
  return std::make_shared<MixerClass>(args);
}

}  // namespace

// --- LMM
// -----------------------------------------------------------------------------------------

TitansLmm::TitansLmm(const MixerArgs& args) {
  const Options options("titans_lmm", args);
  memory_ = register_module("memory", std::make_shared<NeuralMemory>(options, args));
  const int64_t H = memory_->num_heads(), d = memory_->head_dim();
  HeadOutput::Config config;
  config.gate = options.flag("use_gate") ? "silu" : "";
  output_.emplace(*this, args.hidden_size, HeadSizes{H, H, d, d},
                  options.number_or("norm_eps", args.norm_eps), config);
}

State TitansLmm::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  memory_->add_zero_state(state, sequences, options);
  return state;
}

at::Tensor TitansLmm::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state("titans_lmm", x, ctx, *this);
  return output_->forward(memory_->forward(x, state, naive_), x, naive_);
}

MixerInfo titans_lmm_info() {
  return {"titans_lmm",
          "Titans long-term memory",
          "arXiv 2501.00663",
          {"naive", "chunk", "step"},
          {"cpu"},
          joined({neural_memory_options(),
                  {{"use_gate", true,
                    "multiply the normed output by SiLU of a projection of the input"}}}),
          &make<TitansLmm>};
}

// --- MAG and MAL
// ---------------------------------------------------------------------------------

TitansBeside::TitansBeside(const char* name, bool layered, const MixerArgs& args)
    : name_(name), layered_(layered) {
  const Options options(name, args);
  const int64_t D = args.hidden_size;
  const double eps = options.number_or("norm_eps", args.norm_eps);
  persistent_ = add_persistent(*this, options, args);
  memory_ = register_module("memory", std::make_shared<NeuralMemory>(options, args));
  const int64_t width = memory_->width();
  attention_ = register_module(
      "attention", std::make_shared<WindowAttention>(options, layered ? width : D,
                                                     memory_->num_heads(), memory_->head_dim()));
  if (layered) {
    memory_norm_ = register_module("memory_norm", std::make_shared<RmsNorm>(width, eps));
  } else {
    gate_ = register_module("gate", std::make_shared<BranchGate>(options, width, eps));
  }
  o_proj_ = add_linear(*this, "o_proj", width, D);
}

State TitansBeside::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  memory_->add_zero_state(state, sequences, options);
  attention_->add_zero_state(state, sequences, options);
  return state;
}

at::Tensor TitansBeside::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(name_, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1), width = memory_->width();
  const at::Tensor before = tokens_before(state).clone();  // the memory moves it on
  at::Tensor persistent, prefix;
  std::optional<MemoryStart> start;
  if (persistent_.defined()) {
    persistent = prefix = persistent_.to(x.scalar_type());
    // Only fresh sequences need the start, only MAL what the persistent tokens read.
    if (layered_ || (before == 0).any().item<bool>()) {
      at::Tensor outputs;
      start = memory_->start_after(persistent, naive_, &outputs);
      if (layered_) prefix = memory_norm_->forward(outputs.reshape({-1, width}), naive_);
    }
  }
  const at::Tensor m =
      memory_->forward(x, state, naive_, start ? &*start : nullptr).reshape({B, T, width});
  if (layered_) {
    const at::Tensor normed = memory_norm_->forward(m, naive_);
    return o_proj_->forward(attention_->forward(normed, prefix, before, state, naive_));
  }
  const at::Tensor y = attention_->forward(x, prefix, before, state, naive_);
  return o_proj_->forward(gate_->forward(y, m, naive_));
}

namespace {

MixerInfo beside_info(const char* name, const char* title, bool layered,
                      std::shared_ptr<Mixer> (*make)(const MixerArgs&)) {
  MixerInfo info = {
      name,
      title,
      "arXiv 2501.00663",
      {"naive", "chunk", "step"},
      {"cpu"},
      joined({neural_memory_options(),
              {persistent_option(),
               {"window_size", 64, "tokens that a token sees in the attention, itself included"},
               rope_option()}}),
      make};
  if (!layered) info.options = joined({info.options, branch_gate_options()});
  return info;
}

}  // namespace

MixerInfo titans_mag_info() {
  return beside_info("titans_mag", "Titans, memory as a gate", false,
                     [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
                       return std::make_shared<TitansBeside>("titans_mag", false, args);
                     });
}

MixerInfo titans_mal_info() {
  return beside_info("titans_mal", "Titans, memory as a layer", true,
                     [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
                       return std::make_shared<TitansBeside>("titans_mal", true, args);
                     });
}

}  // namespace gdn
