// SPDX-License-Identifier: Apache-2.0
// MAC: memory as context of attention. A block of read_delay tokens needs the memory that the block
// before has left; what needs the tokens alone, and what no later block needs, is computed before
// and after the loop over the blocks, for the whole call at once.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "gdn/mixers/common/loop_linear.h"
#include "gdn/mixers/common/positions.h"
#include "gdn/mixers/common/sequence_groups.h"
#include "gdn/mixers/titans/layer.h"
#include "gdn/ops/common.h"

namespace gdn {

// What a block needs of its tokens alone.
struct TitansMac::Tokens {
  at::Tensor x;               // [R,n,D]
  at::Tensor queries;         // to the memory, [R,n,H,head_dim] as the following
  at::Tensor ahead, q, k, v;  // of the attention; ahead: scores of the prefix

  // Cut at once: the gradient of a slice is as long as what it was cut from.
  std::vector<Tokens> split(at::IntArrayRef sizes) const {
    if (sizes.size() == 1) return {*this};
    auto cut = [&](const at::Tensor& t) { return t.split_with_sizes(sizes, 1); };
    const auto xs = cut(x), of_memory = cut(queries), aheads = cut(ahead), qs = cut(q), ks = cut(k),
               vs = cut(v);
    std::vector<Tokens> parts;
    for (size_t i = 0; i < xs.size(); ++i)
      parts.push_back({xs[i], of_memory[i], aheads[i], qs[i], ks[i], vs[i]});
    return parts;
  }
};

// What all blocks of a call share.
struct TitansMac::Loop {
  LoopLinear read_out, read_keys;       // of what the memory answers, and of that as context
  LoopLinear attention_out, memory_in;  // of what is attended to, and of that for the memory
  MemoryStart learned;
  PrefixKeys prefix;
};

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

at::Tensor TitansMac::heads(const at::Tensor& x) const {
  return x.unflatten(-1, {num_heads_, head_dim_});
}

TitansMac::Loop TitansMac::begin(const at::Tensor& x) {
  Loop loop = {
      LoopLinear({memory_o_proj_.get()}, x),   LoopLinear({k_proj_.get(), v_proj_.get()}, x),
      LoopLinear({attn_o_proj_.get()}, x),     memory_->projections(x),
      memory_->learned_start(x.scalar_type()), {}};
  if (persistent_.defined()) {
    const at::Tensor persistent = persistent_.to(x.scalar_type());
    loop.prefix = {heads(k_proj_->forward(persistent)), heads(v_proj_->forward(persistent))};
  }
  return loop;
}

TitansMac::Tokens TitansMac::project(const at::Tensor& x, StateAccess& state, int64_t position,
                                     const PrefixKeys& prefix) {
  const at::Tensor positions =
      at::arange(position, position + x.size(1), at::kLong).remainder(segment_);
  const std::vector<at::Tensor> projected =
      forward_all(x, {q_proj_.get(), k_proj_.get(), v_proj_.get()});
  const at::Tensor q = heads(projected[0]), k = heads(projected[1]);
  return {x,
          memory_->queries(x, state, "conv_read", naive_),
          prefix_scores(q, prefix, naive_),
          rotated(q, positions, rope_theta_, naive_),
          rotated(k, positions, rope_theta_, naive_),
          heads(projected[2])};
}

// Leaves the keys and values of the segment with those of the block in `segment`. -> what the block
// attends to and what its memory answers, [R,n,D] and [R,n,H,head_dim].
std::pair<at::Tensor, at::Tensor> TitansMac::block(const Tokens& tokens, State& local,
                                                   int64_t position, const Loop& loop,
                                                   KeysAndValues& segment) {
  Context ctx;
  ctx.state = &local;
  StateAccess state("titans_mac", tokens.x, ctx, *this);
  const int64_t n = tokens.x.size(1), past = position % segment_;
  if (position % delay_ == 0) {
    state.write("read_memory",
                position == 0
                    ? loop.learned.memory.unsqueeze(0).expand_as(local["memory"]).contiguous()
                    : state.read("memory"));
  }
  const at::Tensor h =
      loop.read_out.forward(memory_->read(tokens.queries, state.read("read_memory")).flatten(2))[0];
  const std::vector<at::Tensor> of_h = loop.read_keys.forward(h);
  const KeysAndValues fresh = {rotated(heads(of_h[0]), past, rope_theta_, naive_), heads(of_h[1]),
                               tokens.k, tokens.v};
  for (size_t i = 0; i < fresh.size(); ++i)
    segment[i] = past == 0 ? fresh[i] : at::cat({segment[i], fresh[i]}, 1);
  at::Tensor visible = at::ones({n, past + n}, at::kBool).tril(past);
  visible = at::cat({visible, visible}, 1);
  const at::Tensor attended = attend(tokens.q, tokens.ahead, {segment[0], segment[2]},
                                     {segment[1], segment[3]}, loop.prefix, visible, naive_);
  const at::Tensor y = loop.attention_out.forward(attended.flatten(2))[0];
  return {y, memory_->forward(loop.memory_in.forward(y), loop.learned, state, naive_)};
}

at::Tensor TitansMac::run(const at::Tensor& x, State& local, int64_t position, const Loop& loop) {
  const int64_t T = x.size(1), end = position + T;
  if (T == 0) return x;
  std::vector<int64_t> sizes;
  for (int64_t t = position; t < end; t += sizes.back())
    sizes.push_back(std::min(delay_ - t % delay_, end - t));
  KeysAndValues segment;
  if (const int64_t past = position % segment_; past > 0) {
    const at::Tensor seen = local["segment"].narrow(1, 0, past).to(x.scalar_type());
    for (size_t i = 0; i < segment.size(); ++i) segment[i] = seen.select(2, i);
  }
  Context ctx;
  ctx.state = &local;
  StateAccess state("titans_mac", x, ctx, *this);
  const Tokens tokens = project(x, state, position, loop.prefix);
  std::vector<at::Tensor> ys, ms;
  int64_t at = position;
  for (const Tokens& part : tokens.split(sizes)) {
    auto [y, m] = block(part, local, at, loop, segment);
    ys.push_back(y);
    ms.push_back(m);
    at += part.x.size(1);
  }
  const at::Tensor seen = at::stack(segment, 2);  // [R,n,4,H,D]
  if (state.with_grad()) {
    state.write("segment", at::constant_pad_nd(seen, {0, 0, 0, 0, 0, 0, 0, segment_ - seen.size(1)})
                               .to(local["segment"].scalar_type()));
  } else {
    const int64_t begin = std::max(position - (end - 1) / segment_ * segment_, int64_t{0});
    local["segment"].slice(1, begin, seen.size(1)).copy_(seen.slice(1, begin));
  }
  const at::Tensor m = memory_o_proj_->forward(at::cat(ms, 1).flatten(2));
  return gate_->forward(at::cat(ys, 1), m, naive_);
}

at::Tensor TitansMac::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state("titans_mac", x, ctx, *this);
  const int64_t N = state.num_sequences(), T = x.size(1);
  const at::Tensor before = tokens_before(state).clone();
  const int64_t* position = before.const_data_ptr<int64_t>();
  const SequenceGroups groups("titans_mac", state, T,
                              [&](int64_t n, int64_t) { return position[n]; });
  const at::TensorOptions options = x.options().requires_grad(false);
  const Loop loop = begin(x);
  std::vector<at::Tensor> outs;
  std::vector<State> locals;
  for (const SequenceGroup& group : groups) {
    const at::Tensor part = groups.part(group, x);
    if (group.row < 0) {
      outs.push_back(at::zeros_like(part));
      continue;
    }
    State local;
    if (!state.given()) {
      local = zero_state(group.rows, options);
    } else if (groups.together()) {
      local = *ctx.state;
    } else {  // views: without gradients they change in place
      for (const auto& [name, value] : ctx.state->entries())
        local.set(name, value.narrow(0, group.row, 1));
    }
    outs.push_back(run(part, local, group.past, loop));
    locals.push_back(std::move(local));
  }
  if (state.given() && groups.together()) {
    *ctx.state = locals[0];
  } else if (state.given() && state.with_grad() && N > 0) {
    std::vector<std::string> names;
    for (const auto& entry : ctx.state->entries()) names.push_back(entry.first);
    for (const std::string& name : names) {
      std::vector<at::Tensor> rows;
      for (const State& local : locals) rows.push_back(local[name]);
      ctx.state->set(name, at::cat(rows, 0));
    }
  }
  return o_proj_->forward(groups.join(outs));
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
          [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
            return std::make_shared<TitansMac>(args);
          }};
}

}  // namespace gdn
