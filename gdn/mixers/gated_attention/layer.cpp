// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_attention/layer.h"

#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "gdn/mixers/attention/core.h"
#include "gdn/mixers/common/options.h"
#include "gdn/mixers/common/positions.h"
#include "gdn/ops/norm.h"

namespace gdn {
namespace {

constexpr const char* kName = "gated_attention";

}  // namespace

GatedAttention::ZeroCentredNorm::ZeroCentredNorm(int64_t size, double eps) : eps_(eps) {
  weight = register_parameter("weight", at::zeros({size}, at::kFloat));
}

at::Tensor GatedAttention::ZeroCentredNorm::forward(const at::Tensor& x, bool naive) const {
  if (naive) return naive::rms_norm(x, weight.to(x.scalar_type()) + 1, eps_);
  return ops::rms_norm(x, weight + 1, eps_);
}

GatedAttention::GatedAttention(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  head_dim_ = options.positive_or("head_dim", std::min<int64_t>(D >= 2048 ? 256 : 64, D + D % 2));
  num_heads_ = options.positive_or(
      "num_heads",
      std::max<int64_t>(1, std::llround(static_cast<double>(D) / static_cast<double>(head_dim_))));
  num_kv_heads_ = options.positive_or("num_kv_heads", num_heads_);
  options.check(num_heads_ % num_kv_heads_ == 0, "num_kv_heads must divide num_heads (", num_heads_,
                "), got ", num_kv_heads_);
  rope_theta_ = options.number("rope_theta");
  options.check(rope_theta_ > 0, "rope_theta must be positive, got ", rope_theta_);
  const double factor = options.number("partial_rotary_factor");
  options.check(factor >= 0 && factor <= 1, "partial_rotary_factor must be in [0,1], got ", factor);
  rotary_dim_ = static_cast<int64_t>(static_cast<double>(head_dim_) * factor) / 2 * 2;
  const bool bias = options.flag("attention_bias");
  const int64_t width = num_heads_ * head_dim_, kv_width = num_kv_heads_ * head_dim_;
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, 2 * width, bias));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(D, kv_width, bias));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(D, kv_width, bias));
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(width, D, bias));
  const double eps = options.number_or("norm_eps", args.norm_eps);
  q_norm_ = register_module("q_norm", std::make_shared<ZeroCentredNorm>(head_dim_, eps));
  k_norm_ = register_module("k_norm", std::make_shared<ZeroCentredNorm>(head_dim_, eps));
}

State GatedAttention::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  KvCache::make(state, sequences,
                {{"k", num_kv_heads_, head_dim_}, {"v", num_kv_heads_, head_dim_}}, options);
  return state;
}

at::Tensor GatedAttention::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  const at::Tensor both = q_proj_->forward(x).view({B, T, num_heads_, 2 * head_dim_});
  const at::Tensor gate = both.narrow(3, head_dim_, head_dim_);
  AttentionCall call;
  call.q = q_norm_->forward(both.narrow(3, 0, head_dim_), naive_);
  call.fresh = {
      k_norm_->forward(k_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_}), naive_),
      v_proj_->forward(x).view({B, T, num_kv_heads_, head_dim_})};
  call.names = {"k", "v"};
  call.out_dim = head_dim_;
  if (rotary_dim_ > 0) {
    call.place = [&](int64_t position, at::Tensor& query, std::vector<at::Tensor>& fresh) {
      query = rotated(query, position, rope_theta_, naive_, rotary_dim_);
      fresh[0] = rotated(fresh[0], position, rope_theta_, naive_, rotary_dim_);
    };
  }
  call.attend = [&](const at::Tensor& query, const std::vector<at::Tensor>& seen) {
    return softmax_attention(query, seen[0], seen[1], /*window=*/0, naive_);
  };
  const at::Tensor o = attend_with_cache(kName, std::move(call), state, ctx);
  return o_proj_->forward((o * at::sigmoid(gate)).reshape({B, T, num_heads_ * head_dim_}));
}

MixerInfo gated_attention_info() {
  return {
      kName,
      "Gated attention",
      "arXiv 2505.06708",
      {"naive", "chunk", "step"},
      {"cpu"},
      {
          {"num_heads", nullptr,
           "query heads; default: hidden_size / head_dim, rounded, at least 1"},
          {"num_kv_heads", nullptr,
           "key and value heads, a divisor of num_heads (grouped queries); default: num_heads"},
          {"head_dim", nullptr,
           "size of a head; default: 256 from a width of 2048 on, else 64 (at most hidden_size, "
           "made even)"},
          {"partial_rotary_factor", 0.25,
           "the share of each head that is rotated by position, rounded down to an even number of "
           "dimensions"},
          {"rope_theta", 1e7, "base of the rotary positions"},
          {"attention_bias", false, "bias in the four projections"},
          {"norm_eps", nullptr, "epsilon of the norms of q and k; default: that of the model"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedAttention>(args);
      },
  };
}

}  // namespace gdn
