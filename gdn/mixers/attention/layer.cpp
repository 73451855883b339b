// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/attention/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/mixers/common/options.h"
#include "gdn/ops/rope.h"

namespace gdn {
namespace {

constexpr const char* kName = "attention";

// The definition of rotary positions, in double: pair (x_i, x_{i+D/2}) of x [B,T,H,D] at position p
// turns by the angle p * theta^(-2i/D).
at::Tensor naive_rotary(const at::Tensor& x, const at::Tensor& positions, double theta) {
  const int64_t D = x.size(3), half = D / 2;
  const at::Tensor p = positions.to(at::kDouble);
  const at::Tensor exponents = at::arange(half, p.options()) * (-2.0 / static_cast<double>(D));
  const at::Tensor angles = at::outer(p, at::pow(theta, exponents)).unsqueeze(1);
  const at::Tensor cos = angles.cos(), sin = angles.sin();  // [T,1,D/2]
  const at::Tensor low = x.narrow(3, 0, half), high = x.narrow(3, half, half);
  return at::cat({low * cos - high * sin, high * cos + low * sin}, 3).to(x.scalar_type());
}

// Whether query i of T may see key j of S, both counted so that the last query is the last key.
at::Tensor visible(int64_t T, int64_t S, int64_t window, const at::Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const at::Tensor query = at::arange(S - T, S, options).unsqueeze(1);
  const at::Tensor key = at::arange(S, options).unsqueeze(0);
  const at::Tensor past = key <= query;
  return window > 0 ? past.logical_and(key > query - window) : past;
}

// q [B,T,H,D] over k, v [B,S,HKV,D] -> [B,T,H,D].
at::Tensor scaled_dot_product(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const std::optional<at::Tensor>& mask, bool is_causal) {
  return at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                          mask, /*dropout_p=*/0.0, is_causal, std::nullopt,
                                          /*enable_gqa=*/q.size(2) != k.size(2))
      .transpose(1, 2);
}

// The definition, token by token, in double.
at::Tensor naive_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           int64_t window) {
  const int64_t T = q_in.size(1), S = k_in.size(1), group = q_in.size(2) / k_in.size(2);
  const at::Tensor q = q_in.to(at::kDouble);
  const at::Tensor k = k_in.to(at::kDouble).repeat_interleave(group, 2);
  const at::Tensor v = v_in.to(at::kDouble).repeat_interleave(group, 2);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t end = S - T + t + 1, begin = window > 0 ? std::max<int64_t>(end - window, 0) : 0;
    const at::Tensor scores =
        at::einsum("bhd,bshd->bhs", {q.select(1, t), k.slice(1, begin, end)}) /
        std::sqrt(static_cast<double>(q.size(3)));
    rows.push_back(at::einsum("bhs,bshd->bhd", {at::softmax(scores, -1), v.slice(1, begin, end)}));
  }
  return at::stack(rows, 1).to(q_in.scalar_type());
}

int64_t default_heads(int64_t hidden_size, int64_t head_dim) {
  return std::max<int64_t>(
      1, std::llround(static_cast<double>(hidden_size) / static_cast<double>(head_dim)));
}

}  // namespace

// Sequences that stand at the same position: rows [row, row + rows) of the state's tensors.
struct Attention::Group {
  int64_t row, rows;
  int64_t past;        // tokens seen before
  at::Tensor q, k, v;  // [rows,T,H,D] and [rows,T,HKV,D]
};

// What a group's rows of the cache hold after the call.
struct Attention::Kept {
  at::Tensor k, v;  // [rows,capacity,HKV,D]
  int64_t position;
};

// Puts the groups, each of `rows` sequences, one after another into the state.
void Attention::replace(State& state, const std::vector<Kept>& kept, int64_t rows) {
  int64_t capacity = 0;
  for (const Kept& group : kept) capacity = std::max(capacity, group.k.size(1));
  std::vector<at::Tensor> ks, vs, positions;
  for (const Kept& group : kept) {
    const std::vector<int64_t> pad = {0, 0, 0, 0, 0, capacity - group.k.size(1)};
    ks.push_back(at::constant_pad_nd(group.k, pad));
    vs.push_back(at::constant_pad_nd(group.v, pad));
    positions.push_back(at::full({rows}, group.position, at::kLong));
  }
  if (kept.empty()) return;
  state.set("k", at::cat(ks, 0));
  state.set("v", at::cat(vs, 0));
  state.set("position", at::cat(positions, 0));
}

Attention::Attention(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  rope_theta_ = options.number("rope_theta");
  options.check(rope_theta_ >= 0, "rope_theta must be positive, or 0 for no positions, got ",
                rope_theta_);
  const bool heads_given = !args.options.at("num_heads").is_null();
  if (heads_given && args.options.at("head_dim").is_null()) {
    num_heads_ = options.positive("num_heads");
    options.check(D % num_heads_ == 0, "num_heads must divide hidden_size (", D,
                  ") unless head_dim is given, got ", num_heads_);
    head_dim_ = D / num_heads_;
  } else {
    head_dim_ = options.positive_or("head_dim", std::min<int64_t>(64, D + D % 2));
    num_heads_ = options.positive_or("num_heads", default_heads(D, head_dim_));
  }
  options.check(rope_theta_ == 0 || head_dim_ % 2 == 0,
                "head_dim must be even for rotary positions, got ", head_dim_);
  num_kv_heads_ = options.positive_or("num_kv_heads", num_heads_);
  options.check(num_heads_ % num_kv_heads_ == 0, "num_kv_heads must divide num_heads (", num_heads_,
                "), got ", num_kv_heads_);
  const nlohmann::json& window = args.options.at("window_size");
  window_ = window == 0 ? 0 : options.positive("window_size");
  const bool bias = options.flag("qkv_bias");
  const int64_t width = num_heads_ * head_dim_, kv_width = num_kv_heads_ * head_dim_;
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, width, bias));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(D, kv_width, bias));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(D, kv_width, bias));
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(width, D));
  if (options.flag("qk_norm")) {
    const double eps = options.number_or("norm_eps", args.norm_eps);
    q_norm_ = register_module("q_norm", std::make_shared<RmsNorm>(head_dim_, eps));
    k_norm_ = register_module("k_norm", std::make_shared<RmsNorm>(head_dim_, eps));
  }
}

State Attention::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  KvCache::make(state, sequences, num_kv_heads_, head_dim_, options);
  return state;
}

at::Tensor Attention::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
  const int64_t T = q.size(1), S = k.size(1);
  if (naive_) return naive_attention(q, k, v, window_);
  const bool windowed = window_ > 0 && S > window_;
  if (T == 1 && !windowed) return scaled_dot_product(q, k, v, std::nullopt, false);
  if (!windowed && S == T) return scaled_dot_product(q, k, v, std::nullopt, true);
  if (!windowed) return scaled_dot_product(q, k, v, visible(T, S, 0, q), false);
  // Blocks of queries with the keys they can see, so that the cost grows with T times the window.
  const int64_t block = std::max<int64_t>(window_, 64);
  std::vector<at::Tensor> outs;
  for (int64_t begin = 0; begin < T; begin += block) {
    const int64_t end = std::min(begin + block, T);
    const int64_t last = S - T + end, first = std::max<int64_t>(S - T + begin - window_ + 1, 0);
    outs.push_back(scaled_dot_product(q.slice(1, begin, end), k.slice(1, first, last),
                                      v.slice(1, first, last),
                                      visible(end - begin, last - first, window_, q), false));
  }
  return at::cat(outs, 1);
}

// Makes the cache anew, so that it carries gradients.
at::Tensor Attention::attend_anew(const Group& group, const KvCache& cache,
                                  std::vector<Kept>& kept) const {
  const int64_t total = group.past + group.k.size(1), count = cache.kept(total);
  auto extend = [&](const char* name, const at::Tensor& fresh) {
    const at::Tensor old = cache.last(name, group.row, group.rows, cache.kept(group.past));
    return at::cat({old.to(fresh.scalar_type()), fresh}, 1);
  };
  const at::Tensor k = extend("k", group.k), v = extend("v", group.v);
  // The token at position p belongs into row p % capacity.
  auto lay_out = [&](const at::Tensor& all) {
    return at::roll(all.narrow(1, all.size(1) - count, count), total > count ? total % count : 0,
                    1);
  };
  kept.push_back({lay_out(k), lay_out(v), total});
  return attend(group.q, k, v);
}

// Appends to the cache in place.
at::Tensor Attention::attend_in_place(const Group& group, KvCache& cache) const {
  const int64_t T = group.k.size(1);
  cache.reserve(group.past + T);
  if (window_ > 0 && T > 1) {  // appending may overwrite what the first queries still see
    auto extend = [&](const char* name, const at::Tensor& fresh) {
      const int64_t count = std::min(group.past, window_ - 1);
      if (count == 0) return fresh;
      const at::Tensor old = cache.last(name, group.row, group.rows, count);
      return at::cat({old.to(fresh.scalar_type()), fresh}, 1);
    };
    const at::Tensor o = attend(group.q, extend("k", group.k), extend("v", group.v));
    cache.append(group.row, group.rows, group.k, group.v);
    return o;
  }
  cache.append(group.row, group.rows, group.k, group.v);
  const at::ScalarType dtype = group.q.scalar_type();
  return attend(group.q, cache.stored("k", group.row, group.rows).to(dtype),
                cache.stored("v", group.row, group.rows).to(dtype));
}

at::Tensor Attention::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1), N = state.num_sequences();
  at::Tensor q = q_proj_->forward(x).view({B, T, num_heads_, head_dim_});
  at::Tensor k = k_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_});
  const at::Tensor v = v_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_});
  if (q_norm_ != nullptr) {
    q = q_norm_->forward(q, naive_);
    k = k_norm_->forward(k, naive_);
  }

  State none;
  KvCache cache(state.given() ? *ctx.state : none, window_);
  std::vector<at::Tensor> outs;
  std::vector<Kept> kept;
  auto run = [&](Group group) {
    const int64_t length = group.q.size(1);
    if (rope_theta_ > 0) {
      const at::Tensor positions = at::arange(group.past, group.past + length,
                                              at::TensorOptions(x.device()).dtype(at::kLong));
      for (at::Tensor* t : {&group.q, &group.k}) {
        *t = naive_ ? naive_rotary(*t, positions, rope_theta_)
                    : ops::rotary(*t, positions, rope_theta_);
      }
    }
    at::Tensor o = !state.given()      ? attend(group.q, group.k, group.v)
                   : state.with_grad() ? attend_anew(group, cache, kept)
                                       : attend_in_place(group, cache);
    outs.push_back(o);
  };
  const at::Tensor cu = ops::host_cu_seqlens(kName, state.cu_seqlens(), T);
  const int64_t* ends = ops::data_or_null(cu);
  const int64_t* slots = ops::data_or_null(state.slots());
  bool together = ends == nullptr && slots == nullptr;
  for (int64_t n = 1; together && state.given() && n < N; ++n)
    together = cache.position(n) == cache.position(0);
  if (together) {
    run({0, N, state.given() && N > 0 ? cache.position(0) : 0, q, k, v});
  } else {
    for (int64_t n = 0; n < N; ++n) {
      const int64_t row = slots != nullptr ? slots[n] : n;
      auto part = [&](const at::Tensor& t) {
        return ends != nullptr ? t.slice(1, ends[n], ends[n + 1]) : t.narrow(0, n, 1);
      };
      if (row < 0) {  // no sequence here
        outs.push_back(at::zeros({1, T, num_heads_, head_dim_}, q.options()));
      } else {
        run({row, 1, state.given() ? cache.position(row) : 0, part(q), part(k), part(v)});
      }
    }
  }
  if (state.given() && state.with_grad()) replace(*ctx.state, kept, together ? N : 1);
  const at::Tensor o = outs.size() == 1 ? outs[0] : at::cat(outs, ends != nullptr ? 1 : 0);
  return o_proj_->forward(o.reshape({B, T, num_heads_ * head_dim_}));
}

MixerInfo attention_info() {
  return {
      kName,
      "Softmax attention",
      "arXiv 1706.03762",
      {"naive", "chunk", "step"},
      {"cpu"},
      {
          {"num_heads", nullptr,
           "query heads; default: hidden_size / head_dim, rounded, at least 1"},
          {"num_kv_heads", nullptr,
           "key and value heads, a divisor of num_heads (grouped queries); default: num_heads"},
          {"head_dim", nullptr,
           "size of a head; default: hidden_size / num_heads where that is given, else 64 (at most "
           "hidden_size, made even)"},
          {"qkv_bias", false, "bias in the projections of q, k and v"},
          {"qk_norm", false, "RMSNorm over each head of q and k"},
          {"window_size", 0, "tokens that a token sees, itself included; 0: all before it"},
          {"rope_theta", 10000.0, "base of the rotary positions; 0: none"},
          {"norm_eps", nullptr, "epsilon of qk_norm; default: that of the model"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<Attention>(args);
      },
  };
}

}  // namespace gdn
