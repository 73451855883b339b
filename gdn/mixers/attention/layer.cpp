// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/attention/layer.h"

#include <algorithm>
#include <cmath>

#include "gdn/mixers/attention/core.h"
#include "gdn/mixers/common/options.h"
#include "gdn/mixers/common/positions.h"

namespace gdn {
namespace {

constexpr const char* kName = "attention";

int64_t default_heads(int64_t hidden_size, int64_t head_dim) {
  return std::max<int64_t>(
      1, std::llround(static_cast<double>(hidden_size) / static_cast<double>(head_dim)));
}

}  // namespace

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
  KvCache::make(state, sequences,
                {{"k", num_kv_heads_, head_dim_}, {"v", num_kv_heads_, head_dim_}}, options);
  return state;
}

at::Tensor Attention::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  at::Tensor q = q_proj_->forward(x).view({B, T, num_heads_, head_dim_});
  at::Tensor k = k_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_});
  const at::Tensor v = v_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_});
  if (q_norm_ != nullptr) {
    q = q_norm_->forward(q, naive_);
    k = k_norm_->forward(k, naive_);
  }
  AttentionCall call;
  call.q = q;
  call.fresh = {k, v};
  call.names = {"k", "v"};
  call.window = window_;
  call.out_dim = head_dim_;
  if (rope_theta_ > 0) {
    call.place = [&](int64_t position, at::Tensor& query, std::vector<at::Tensor>& fresh) {
      query = rotated(query, position, rope_theta_, naive_);
      fresh[0] = rotated(fresh[0], position, rope_theta_, naive_);
    };
  }
  call.attend = [&](const at::Tensor& query, const std::vector<at::Tensor>& seen) {
    return softmax_attention(query, seen[0], seen[1], window_, naive_);
  };
  const at::Tensor o = attend_with_cache(kName, std::move(call), state, ctx);
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
