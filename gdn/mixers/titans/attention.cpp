// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/titans/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gdn/mixers/common/delta_layer.h"
#include "gdn/mixers/common/positions.h"
#include "gdn/mixers/common/sequence_groups.h"
#include "gdn/mixers/common/windows.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr double kPersistentStd = 0.02;

// The definition in double: for each token one softmax over the list of keys that it sees.
at::Tensor naive_attend(const at::Tensor& q, const at::Tensor& ahead, const at::Tensor& k,
                        const at::Tensor& v, const PrefixKeys& prefix, const at::Tensor& visible) {
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < q.size(1); ++t) {
    const at::Tensor query = q.select(1, t).to(at::kDouble).unsqueeze(1);  // [R,1,H,D]
    at::Tensor keys = k.to(at::kDouble), values = v.to(at::kDouble);
    if (visible.defined()) {
      const at::Tensor seen = visible[t].nonzero().squeeze(1);
      keys = keys.index_select(1, seen);
      values = values.index_select(1, seen);
    }
    at::Tensor scores = (query * keys).sum(3) * scale;  // [R,S,H]
    if (prefix.k.defined()) {
      scores = at::cat({ahead.select(1, t).transpose(1, 2), scores}, 1);
      values = at::cat({prefix.v.to(at::kDouble)
                            .unsqueeze(0)
                            .expand({q.size(0), prefix.v.size(0), q.size(2), q.size(3)}),
                        values},
                       1);
    }
    const at::Tensor weights = at::softmax(scores, 1).unsqueeze(3);
    rows.push_back((weights * values).sum(1));
  }
  return at::stack(rows, 1).to(q.scalar_type());
}

}  // namespace

at::Tensor prefix_scores(const at::Tensor& q0, const PrefixKeys& prefix, bool naive) {
  if (!prefix.k.defined()) return at::empty({q0.size(0), q0.size(1), q0.size(2), 0}, q0.options());
  const double scale = 1 / std::sqrt(static_cast<double>(q0.size(3)));
  if (naive) {
    return (q0.to(at::kDouble).unsqueeze(3) * prefix.k.to(at::kDouble).transpose(0, 1)).sum(4) *
           scale;
  }
  const at::Tensor keys = prefix.k.permute({1, 2, 0});  // [H,D,N_p]
  return at::matmul((q0 * scale).transpose(1, 2), keys).transpose(1, 2);
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& ahead, at::TensorList k, at::TensorList v,
                  const PrefixKeys& prefix, const at::Tensor& visible, bool naive) {
  if (naive) return naive_attend(q, ahead, at::cat(k, 1), at::cat(v, 1), prefix, visible);
  const int64_t R = q.size(0), H = q.size(2);
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  auto by_head = [](const at::Tensor& t) { return t.transpose(1, 2).flatten(0, 1); };  // [R H,.,D]
  const at::Tensor queries = by_head(q * scale), keys = by_head(at::cat(k, 1)).transpose(1, 2);
  at::Tensor scores;  // [R H,T,S]
  if (visible.defined()) {
    const at::Tensor hidden =
        at::zeros(visible.sizes(), q.options().requires_grad(false))
            .masked_fill_(visible.logical_not(), -std::numeric_limits<double>::infinity());
    scores = at::baddbmm(hidden, queries, keys);
  } else {
    scores = at::bmm(queries, keys);
  }
  std::vector<at::Tensor> values = v.vec();
  if (prefix.k.defined()) {
    scores = at::cat({by_head(ahead), scores}, -1);
    values.insert(values.begin(), prefix.v.unsqueeze(0).expand({R, -1, -1, -1}));
  }
  return at::bmm(at::softmax(scores, -1), by_head(at::cat(values, 1)))
      .unflatten(0, {R, H})
      .transpose(1, 2);
}

WindowAttention::WindowAttention(const Options& options, int64_t in_features, int64_t heads,
                                 int64_t head_dim)
    : num_heads_(heads), head_dim_(head_dim) {
  window_ = options.positive("window_size");
  rope_theta_ = options.number("rope_theta");
  options.check(rope_theta_ >= 0, "rope_theta must be positive, or 0 for no positions, got ",
                rope_theta_);
  if (head_dim_ % 2 != 0) rope_theta_ = 0;
  q_proj_ = add_linear(*this, "q_proj", in_features, heads * head_dim);
  k_proj_ = add_linear(*this, "k_proj", in_features, heads * head_dim);
  v_proj_ = add_linear(*this, "v_proj", in_features, heads * head_dim);
}

void WindowAttention::add_zero_state(State& state, int64_t sequences,
                                     const at::TensorOptions& options) const {
  for (const char* name : {"window_k", "window_v"})
    state.set(name, at::zeros({sequences, window_, num_heads_, head_dim_}, options));
}

// Sequences at the same position `past`. Leaves the ring behind: in place, or as new tensors.
at::Tensor WindowAttention::run(const at::Tensor& q0, const at::Tensor& k0, const at::Tensor& v,
                                const PrefixKeys& prefix, int64_t past, Ring* ring, bool in_place,
                                bool naive) const {
  const int64_t T = q0.size(1);
  const at::Tensor q = rotated(q0, past, rope_theta_, naive);
  at::Tensor keys = rotated(k0, past, rope_theta_, naive), values = v;
  if (ring != nullptr) {
    const int64_t count = std::min(past, window_ - 1);
    auto places = [&](int64_t begin, int64_t end) {
      return at::arange(begin, end, at::kLong).remainder(window_);
    };
    const at::Tensor old = places(past - count, past);
    const at::Tensor all_keys =
        at::cat({ring->k.index_select(1, old).to(keys.scalar_type()), keys}, 1);
    const at::Tensor all_values =
        at::cat({ring->v.index_select(1, old).to(v.scalar_type()), values}, 1);
    const int64_t fresh = std::min(T, window_);
    const at::Tensor at = places(past + T - fresh, past + T);
    const at::Tensor new_k = keys.narrow(1, T - fresh, fresh).to(ring->k.scalar_type());
    const at::Tensor new_v = values.narrow(1, T - fresh, fresh).to(ring->v.scalar_type());
    if (in_place) {
      ring->k.index_copy_(1, at, new_k);
      ring->v.index_copy_(1, at, new_v);
    } else {
      ring->k = at::index_copy(ring->k, 1, at, new_k);
      ring->v = at::index_copy(ring->v, 1, at, new_v);
    }
    keys = all_keys;
    values = all_values;
  }
  if (T == 0) return q;
  const std::vector<at::Tensor> turned = query_blocks(q, window_),
                                ahead = query_blocks(prefix_scores(q0, prefix, naive), window_),
                                seen_keys = key_blocks(keys, T, window_),
                                seen_values = key_blocks(values, T, window_);
  std::vector<at::Tensor> outs;
  for (size_t i = 0; i < turned.size(); ++i) {
    const int64_t queries = turned[i].size(1);
    const at::Tensor visible =
        queries > 1 ? visible_keys(queries, seen_keys[i].size(1), window_, q) : at::Tensor();
    outs.push_back(
        attend(turned[i], ahead[i], seen_keys[i], seen_values[i], prefix, visible, naive));
  }
  return at::cat(outs, 1);
}

at::Tensor WindowAttention::forward(const at::Tensor& x, const at::Tensor& persistent,
                                    const at::Tensor& before, StateAccess& state, bool naive) {
  const int64_t B = x.size(0), T = x.size(1);
  auto heads = [&](const at::Tensor& t) {
    return t.view({t.size(0), t.size(1), num_heads_, head_dim_});
  };
  const at::Tensor q = heads(q_proj_->forward(x)), k = heads(k_proj_->forward(x)),
                   v = heads(v_proj_->forward(x));
  PrefixKeys prefix;
  if (persistent.defined() && persistent.size(0) > 0) {
    prefix.k = heads(k_proj_->forward(persistent.unsqueeze(0))).squeeze(0);
    prefix.v = heads(v_proj_->forward(persistent.unsqueeze(0))).squeeze(0);
  }
  const int64_t* position = before.const_data_ptr<int64_t>();
  const SequenceGroups groups("window_attention", state, T,
                              [&](int64_t n, int64_t) { return position[n]; });
  std::vector<at::Tensor> outs, ks, vs;
  for (const SequenceGroup& group : groups) {
    if (group.row < 0) {
      outs.push_back(at::zeros({1, T, num_heads_, head_dim_}, q.options()));
      continue;
    }
    const at::Tensor gq = groups.part(group, q), gk = groups.part(group, k),
                     gv = groups.part(group, v);
    if (!state.given()) {
      outs.push_back(run(gq, gk, gv, prefix, group.past, nullptr, false, naive));
      continue;
    }
    Ring ring = {state.pool("window_k").narrow(0, group.row, group.rows),
                 state.pool("window_v").narrow(0, group.row, group.rows)};
    outs.push_back(run(gq, gk, gv, prefix, group.past, &ring, !state.with_grad(), naive));
    ks.push_back(ring.k);
    vs.push_back(ring.v);
  }
  if (state.with_grad() && state.given()) {
    state.write("window_k", at::cat(ks, 0));
    state.write("window_v", at::cat(vs, 0));
  }
  return groups.join(outs).reshape({B, T, num_heads_ * head_dim_});
}

std::vector<MixerOption> branch_gate_options() {
  return {
      {"gate", "memory",
       "how attention y and memory m are combined, both normed: memory: y act(m), both: act(y) "
       "act(m), or product: act(y m)"},
      {"gate_activation", "sigmoid", "act of the gate: sigmoid or silu"},
  };
}

BranchGate::BranchGate(const Options& options, int64_t width, double eps) {
  silu_ = options.text("gate_activation", {"sigmoid", "silu"}) == "silu";
  const std::string gate = options.text("gate", {"memory", "both", "product"});
  both_ = gate == "both";
  product_ = gate == "product";
  y_norm_ = register_module("y_norm", std::make_shared<RmsNorm>(width, eps));
  m_norm_ = register_module("m_norm", std::make_shared<RmsNorm>(width, eps));
}

at::Tensor BranchGate::forward(const at::Tensor& y, const at::Tensor& m, bool naive) {
  auto act = [&](const at::Tensor& t) { return silu_ ? at::silu(t) : at::sigmoid(t); };
  const at::Tensor b = m_norm_->forward(m, naive);
  if (!product_ && !both_) return y_norm_->forward_gated(y, b, naive, silu_ ? "silu" : "sigmoid");
  const at::Tensor a = y_norm_->forward(y, naive);
  return product_ ? act(a * b) : act(a) * act(b);
}

MixerOption rope_option() {
  return {"rope_theta", 10000.0,
          "base of the rotary positions in the attention (with an even head_dim); 0: none"};
}

MixerOption persistent_option() {
  return {"persistent_tokens", 4, "learned vectors that stand before every sequence; 0: none"};
}

at::Tensor add_persistent(torch::nn::Module& owner, const Options& options, const MixerArgs& args) {
  const auto count = args.options.at("persistent_tokens").get<int64_t>();
  options.check(count >= 0, "persistent_tokens must be an integer of at least 0, got ", count);
  if (count == 0) return {};
  c10::NoGradGuard no_grad;
  return owner.register_parameter(
      "persistent", at::empty({count, args.hidden_size}, at::kFloat).normal_(0.0, kPersistentStd));
}

}  // namespace gdn
