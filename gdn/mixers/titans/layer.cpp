// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/titans/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <vector>

#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr double kPersistentStd = 0.02;

MixerOption persistent_option() {
  return {"persistent_tokens", 4, "learned vectors that stand before every sequence; 0: none"};
}
MixerOption rope_option() {
  return {"rope_theta", 10000.0,
          "base of the rotary positions in the attention (with an even head_dim); 0: none"};
}

// The parameter "persistent" [count,D] of the option, undefined for 0.
at::Tensor add_persistent(torch::nn::Module& owner, const Options& options, const MixerArgs& args) {
  const auto count = args.options.at("persistent_tokens").get<int64_t>();
  options.check(count >= 0, "persistent_tokens must be an integer of at least 0, got ", count);
  if (count == 0) return {};
  c10::NoGradGuard no_grad;
  return owner.register_parameter(
      "persistent", at::empty({count, args.hidden_size}, at::kFloat).normal_(0.0, kPersistentStd));
}

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

// --- MAC
// -----------------------------------------------------------------------------------------

TitansMac::TitansMac(const MixerArgs& args) {
  const Options options("titans_mac", args);
  const int64_t D = args.hidden_size;
  const double eps = options.number_or("norm_eps", args.norm_eps);
  segment_ = options.positive("segment_size");
  delay_ = options.positive_or("read_delay", segment_);
  options.check(segment_ % delay_ == 0, "read_delay must divide segment_size (", segment_,
                "), got ", delay_);
  rope_theta_ = options.number("rope_theta");
  options.check(rope_theta_ >= 0, "rope_theta must be positive, or 0 for no positions, got ",
                rope_theta_);
  persistent_ = add_persistent(*this, options, args);
  memory_ = register_module("memory", std::make_shared<NeuralMemory>(options, args));
  num_heads_ = memory_->num_heads();
  head_dim_ = memory_->head_dim();
  if (head_dim_ % 2 != 0) rope_theta_ = 0;
  const int64_t width = memory_->width();
  q_proj_ = add_linear(*this, "q_proj", D, width);
  k_proj_ = add_linear(*this, "k_proj", D, width);
  v_proj_ = add_linear(*this, "v_proj", D, width);
  attn_o_proj_ = add_linear(*this, "attn_o_proj", width, D);
  memory_o_proj_ = add_linear(*this, "memory_o_proj", width, D);
  gate_ = register_module("gate", std::make_shared<BranchGate>(options, D, eps));
  o_proj_ = add_linear(*this, "o_proj", D, D);
}

State TitansMac::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  memory_->add_zero_state(state, sequences, options);
  memory_->add_read_state(state, "conv_read", sequences, options);
  // The weights at the start of the block of read_delay tokens.
  state.set("read_memory", at::zeros(state["memory"].sizes(), state["memory"].options()));
  // Keys and values of the segment so far, of what was read from the memory and of the tokens.
  state.set("segment", at::zeros({sequences, segment_, 4, num_heads_, head_dim_}, options));
  return state;
}

// A block of tokens inside one segment and one block of read_delay tokens.
at::Tensor TitansMac::block(const at::Tensor& x, State& local, int64_t position,
                            const PrefixKeys& prefix) {
  Context ctx;
  ctx.state = &local;
  StateAccess state("titans_mac", x, ctx, *this);
  const int64_t R = x.size(0), n = x.size(1), past = position % segment_;
  if (position % delay_ == 0) {
    const at::Tensor learned = memory_->learned_start(x.scalar_type()).memory.unsqueeze(0);
    state.write("read_memory", position == 0 ? learned.expand_as(local["memory"]).contiguous()
                                             : state.read("memory"));
  }
  const at::Tensor h = memory_o_proj_->forward(
      memory_->read(x, state.read("read_memory"), state, "conv_read", naive_).reshape({R, n, -1}));
  auto heads = [&](const at::Tensor& t) { return t.view({R, n, num_heads_, head_dim_}); };
  auto turned = [&](const at::Tensor& t) { return rotated(heads(t), past, rope_theta_, naive_); };
  const at::Tensor q0 = heads(q_proj_->forward(x));
  const at::Tensor fresh = at::stack({turned(k_proj_->forward(h)), heads(v_proj_->forward(h)),
                                      turned(k_proj_->forward(x)), heads(v_proj_->forward(x))},
                                     2);  // [R,n,4,H,D]
  const at::Tensor segment = state.read("segment");
  const at::Tensor all = at::cat({segment.narrow(1, 0, past).to(x.scalar_type()), fresh}, 1);
  const at::Tensor keys = at::cat({all.select(2, 0), all.select(2, 2)}, 1);
  const at::Tensor values = at::cat({all.select(2, 1), all.select(2, 3)}, 1);
  at::Tensor visible = at::ones({n, past + n}, at::kBool).tril(past);
  visible = at::cat({visible, visible}, 1);
  const at::Tensor y = attn_o_proj_->forward(
      attend(rotated(q0, past, rope_theta_, naive_), q0, keys, values, prefix, visible, naive_)
          .reshape({R, n, -1}));
  if (state.with_grad()) {
    state.write("segment", at::constant_pad_nd(all, {0, 0, 0, 0, 0, 0, 0, segment_ - all.size(1)})
                               .to(segment.scalar_type()));
  } else {
    local["segment"].narrow(1, past, n).copy_(fresh);
  }
  const at::Tensor m =
      memory_o_proj_->forward(memory_->forward(y, state, naive_).reshape({R, n, -1}));
  return gate_->forward(y, m, naive_);
}

at::Tensor TitansMac::run(const at::Tensor& x, State& local, int64_t position) {
  PrefixKeys prefix;
  if (persistent_.defined()) {
    const at::Tensor persistent = persistent_.to(x.scalar_type());
    auto heads = [&](const at::Tensor& t) { return t.view({-1, num_heads_, head_dim_}); };
    prefix = {heads(k_proj_->forward(persistent)), heads(v_proj_->forward(persistent))};
  }
  if (x.size(1) == 0) return x;
  // Cut at once: the gradient of a slice is as long as what it was cut from.
  std::vector<int64_t> sizes;
  for (int64_t t = 0; t < x.size(1); t += sizes.back())
    sizes.push_back(std::min(delay_ - (position + t) % delay_, x.size(1) - t));
  std::vector<at::Tensor> outs;
  for (const at::Tensor& part : x.split_with_sizes(sizes, 1)) {
    outs.push_back(block(part, local, position, prefix));
    position += part.size(1);
  }
  return at::cat(outs, 1);
}

at::Tensor TitansMac::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state("titans_mac", x, ctx, *this);
  const int64_t N = state.num_sequences(), T = x.size(1);
  const at::Tensor before = tokens_before(state).clone();
  const int64_t* position = before.const_data_ptr<int64_t>();
  const at::Tensor cu = ops::host_cu_seqlens("titans_mac", state.cu_seqlens(), T);
  const int64_t* ends = ops::data_or_null(cu);
  const int64_t* slots = ops::data_or_null(state.slots());
  bool together = ends == nullptr && slots == nullptr;
  for (int64_t n = 1; together && n < N; ++n) together = position[n] == position[0];
  const at::TensorOptions options = x.options().requires_grad(false);
  if (together) {
    State local = state.given() ? *ctx.state : zero_state(N, options);
    const at::Tensor y = run(x, local, N > 0 ? position[0] : 0);
    if (state.given()) *ctx.state = local;
    return o_proj_->forward(y);
  }
  std::vector<at::Tensor> outs;
  std::vector<State> locals;
  for (int64_t n = 0; n < N; ++n) {
    const at::Tensor part = ends != nullptr ? x.slice(1, ends[n], ends[n + 1]) : x.narrow(0, n, 1);
    const int64_t row = slots != nullptr ? slots[n] : n;
    if (row < 0) {  // no sequence here
      outs.push_back(at::zeros_like(part));
      continue;
    }
    State local;
    if (state.given()) {  // views: without gradients they change in place
      for (const auto& [name, value] : ctx.state->entries())
        local.set(name, value.narrow(0, row, 1));
    } else {
      local = zero_state(1, options);
    }
    outs.push_back(run(part, local, position[n]));
    locals.push_back(std::move(local));
  }
  if (state.given() && state.with_grad() && N > 0) {
    std::vector<std::string> names;
    for (const auto& entry : ctx.state->entries()) names.push_back(entry.first);
    for (const std::string& name : names) {
      std::vector<at::Tensor> rows;
      for (const State& local : locals) rows.push_back(local[name]);
      ctx.state->set(name, at::cat(rows, 0));
    }
  }
  return o_proj_->forward(at::cat(outs, ends != nullptr ? 1 : 0));
}

MixerInfo titans_mac_info() {
  return {"titans_mac",
          "Titans, memory as context",
          "arXiv 2501.00663",
          {"naive", "chunk", "step"},
          {"cpu"},
          joined({neural_memory_options(),
                  {persistent_option(),
                   {"segment_size", 64, "tokens that attend to each other"},
                   {"read_delay", nullptr,
                    "tokens that read the same weights as context, a divisor of segment_size; "
                    "default: segment_size"},
                   rope_option()},
                  branch_gate_options()}),
          &make<TitansMac>};
}

}  // namespace gdn
