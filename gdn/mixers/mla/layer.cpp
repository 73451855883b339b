// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mla/layer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "gdn/mixers/attention/core.h"
#include "gdn/mixers/common/options.h"
#include "gdn/ops/attend_step.h"

namespace gdn {
namespace {

constexpr const char* kName = "mla";

}  // namespace

Mla::Mla(const MixerArgs& args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  nope_dim_ = options.positive_or("qk_nope_head_dim", D >= 1024 ? 128 : std::min<int64_t>(D, 64));
  const nlohmann::json& shared = args.options.at("qk_rope_head_dim");
  shared_dim_ = shared == 0 ? 0 : options.positive_or("qk_rope_head_dim", nope_dim_ / 2);
  v_dim_ = options.positive_or("v_head_dim", nope_dim_);
  num_heads_ = options.positive_or(
      "num_heads",
      std::max<int64_t>(1, std::llround(static_cast<double>(D) / static_cast<double>(nope_dim_))));
  rank_ = options.positive_or("kv_lora_rank", std::min(4 * nope_dim_, D));
  const nlohmann::json& query_rank = args.options.at("q_lora_rank");
  absorb_ = options.flag("absorb");
  const bool bias = options.flag("attention_bias");
  const double eps = options.number_or("norm_eps", args.norm_eps);
  const int64_t q_width = num_heads_ * (nope_dim_ + shared_dim_);
  if (query_rank == 0) {
    q_proj_ = register_module("q_proj", std::make_shared<Linear>(D, q_width));
  } else {
    const int64_t rank = options.positive("q_lora_rank");
    q_a_proj_ = register_module("q_a_proj", std::make_shared<Linear>(D, rank, bias));
    q_a_layernorm_ = register_module("q_a_layernorm", std::make_shared<RmsNorm>(rank, eps));
    q_b_proj_ = register_module("q_b_proj", std::make_shared<Linear>(rank, q_width));
  }
  kv_a_proj_with_mqa_ =
      register_module("kv_a_proj_with_mqa", std::make_shared<Linear>(D, rank_ + shared_dim_, bias));
  kv_a_layernorm_ = register_module("kv_a_layernorm", std::make_shared<RmsNorm>(rank_, eps));
  kv_b_proj_ = register_module("kv_b_proj",
                               std::make_shared<Linear>(rank_, num_heads_ * (nope_dim_ + v_dim_)));
  o_proj_ = register_module("o_proj", std::make_shared<Linear>(num_heads_ * v_dim_, D, bias));
}

State Mla::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state;
  KvCache::make(state, sequences, {{"latent", 1, rank_ + shared_dim_}}, options);
  return state;
}

at::Tensor Mla::queries(const at::Tensor& x) {
  const at::Tensor q =
      q_proj_ ? q_proj_->forward(x)
              : q_b_proj_->forward(q_a_layernorm_->forward(q_a_proj_->forward(x), naive_));
  return q.view({x.size(0), x.size(1), num_heads_, nope_dim_ + shared_dim_});
}

// Keys and values of every head from the latents, then ordinary attention.
at::Tensor Mla::attend_expanded(const at::Tensor& q, const at::Tensor& latent) {
  const int64_t B = latent.size(0), S = latent.size(1);
  const at::Tensor kv =
      kv_b_proj_->forward(latent.narrow(3, 0, rank_)).view({B, S, num_heads_, nope_dim_ + v_dim_});
  const at::Tensor shared =
      latent.narrow(3, rank_, shared_dim_).expand({B, S, num_heads_, shared_dim_});
  const at::Tensor k = at::cat({kv.narrow(3, 0, nope_dim_), shared}, 3);
  return softmax_attention(q, k, kv.narrow(3, nope_dim_, v_dim_), /*window=*/0, naive_);
}

// The same with kv_b_proj moved to the queries and to the result, so that all heads read the
// latents themselves: S (rank + shared) numbers instead of S H (K + V).
at::Tensor Mla::attend_absorbed(const at::Tensor& q, const at::Tensor& latent) {
  const int64_t B = q.size(0), T = q.size(1), S = latent.size(1), width = rank_ + shared_dim_;
  const at::Tensor weight =
      kv_b_proj_->weight.to(q.scalar_type()).view({num_heads_, nope_dim_ + v_dim_, rank_});
  const at::Tensor up_k = weight.narrow(1, 0, nope_dim_);       // [H,K,rank]
  const at::Tensor up_v = weight.narrow(1, nope_dim_, v_dim_);  // [H,V,rank]
  const at::Tensor absorbed = at::einsum("bthk,hkr->bthr", {q.narrow(3, 0, nope_dim_), up_k});
  const at::Tensor rows = at::cat({absorbed, q.narrow(3, nope_dim_, shared_dim_)}, 3);
  const at::Tensor values = latent.narrow(3, 0, rank_);
  const double scale = 1.0 / std::sqrt(static_cast<double>(nope_dim_ + shared_dim_));
  at::Tensor read;  // [B,T,H,rank]
  if (ops::can_attend_step(rows, latent, values)) {
    read = ops::attend_step(rows, latent, values, scale);
  } else {
    const at::Tensor keys = latent.squeeze(2);  // [B,S,width]
    at::Tensor scores =
        (at::matmul(rows.reshape({B, T * num_heads_, width}), keys.transpose(1, 2)) * scale)
            .view({B, T, num_heads_, S});
    if (T > 1) {
      const at::Tensor visible = visible_keys(T, S, /*window=*/0, q);
      scores = scores.masked_fill(visible.logical_not().view({1, T, 1, S}),
                                  -std::numeric_limits<double>::infinity());
    }
    read = at::matmul(at::softmax(scores, -1).view({B, T * num_heads_, S}), values.squeeze(2))
               .view({B, T, num_heads_, rank_});
  }
  return at::einsum("bthr,hvr->bthv", {read, up_v});
}

at::Tensor Mla::forward(const at::Tensor& x, const Context& ctx) {
  StateAccess state(kName, x, ctx, *this);
  const int64_t B = x.size(0), T = x.size(1);
  const at::Tensor kv = kv_a_proj_with_mqa_->forward(x);  // [B,T,rank+shared]
  const at::Tensor compressed = kv_a_layernorm_->forward(kv.narrow(2, 0, rank_), naive_);
  AttentionCall call;
  call.q = queries(x);
  call.fresh = {at::cat({compressed, kv.narrow(2, rank_, shared_dim_)}, 2).unsqueeze(2)};
  call.names = {"latent"};
  call.out_dim = v_dim_;
  call.attend = [&](const at::Tensor& q, const std::vector<at::Tensor>& seen) {
    const bool absorbed = absorb_ && !naive_ && state.step();
    return absorbed ? attend_absorbed(q, seen[0]) : attend_expanded(q, seen[0]);
  };
  const at::Tensor o = attend_with_cache(kName, std::move(call), state, ctx);
  return o_proj_->forward(o.reshape({B, T, num_heads_ * v_dim_}));
}

MixerInfo mla_info() {
  return {
      kName,
      "Multi-head latent attention",
      "arXiv 2405.04434",
      {"naive", "chunk", "step"},
      {"cpu"},
      {
          {"num_heads", nullptr, "heads; default: hidden_size / qk_nope_head_dim, rounded"},
          {"qk_nope_head_dim", nullptr,
           "size of a head's own keys; default: 128 from a width of 1024 on, else 64 (at most "
           "hidden_size)"},
          {"qk_rope_head_dim", nullptr,
           "size of the part of the keys that all heads share; it is not rotated, whatever its "
           "name; 0: none; default: half of qk_nope_head_dim"},
          {"v_head_dim", nullptr, "size of a head's values; default: qk_nope_head_dim"},
          {"kv_lora_rank", nullptr,
           "numbers that keys and values of a token are made from; default: 4 * qk_nope_head_dim, "
           "at most hidden_size"},
          {"q_lora_rank", 0, "rank of the queries' projection; 0: a full one"},
          {"absorb", true,
           "decode on the latents, with kv_b_proj moved into query and output; false: expand them"},
          {"attention_bias", false, "bias in the projections down to a rank and in o_proj"},
          {"norm_eps", nullptr, "epsilon of the norms of the latents; default: that of the model"},
      },
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Mla>(args); },
  };
}

}  // namespace gdn
