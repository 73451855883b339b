// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/causal_lm.h"

#include <ATen/ops/add.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/nonzero.h>
#include <c10/core/GradMode.h>

#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/mixers/common/modules.h"
#include "gdn/model/feed_forward.h"
#include "gdn/model/recompute.h"
#include "gdn/ops/common.h"
#include "gdn/ops/linear.h"
#include "gdn/ops/linear_cross_entropy.h"

namespace gdn {
namespace {

constexpr int64_t kNoTarget = -100;

class Embedding : public torch::nn::Module {
 public:
  Embedding(int64_t count, int64_t size) {
    weight = register_parameter("weight", at::empty({count, size}, at::kFloat));
  }
  at::Tensor weight;
};

// What goes through one block: x, what the last sublayer wants added to it, and what the layers
// share. The sum is left to the next norm, which reads it anyway.
struct Stream {
  at::Tensor x;
  at::Tensor added;  // undefined: nothing
  double scale = 1;  // of `added`
  Shared shared;

  void settle() {
    if (added.defined()) x = at::add(x, added, scale);
    added.reset();
  }
  at::Tensor normed(RmsNorm& norm, bool naive) {
    if (!added.defined()) return norm.forward(x, naive);
    at::Tensor y;
    std::tie(x, y) = norm.forward_added(x, added, scale, naive);
    added.reset();
    return y;
  }
};

class Block : public torch::nn::Module {
 public:
  Block(const ModelConfig& config, size_t i) : scale_(config.blocks[i].residual_scale) {
    const BlockConfig& block = config.blocks[i];
    post_norm_ = block.norm_place == NormPlace::kPost;
    if (!block.mixer.empty()) {
      MixerArgs args;
      args.hidden_size = config.hidden_size;
      args.layer_idx = static_cast<int64_t>(i);
      args.num_layers = static_cast<int64_t>(config.blocks.size());
      args.norm_eps = config.norm_eps;
      args.options = block.mixer_options;
      attn_norm_ = register_module("attn_norm",
                                   std::make_shared<RmsNorm>(config.hidden_size, config.norm_eps));
      attn = register_module("attn", make_mixer(block.mixer, std::move(args)));
    }
    if (auto feed_forward = make_feed_forward(config, i)) {
      mlp_norm_ = register_module("mlp_norm",
                                  std::make_shared<RmsNorm>(config.hidden_size, config.norm_eps));
      mlp = register_module("mlp", std::move(feed_forward));
    }
  }

  void forward(Stream& stream, const ModelContext& ctx, size_t i, bool naive) {
    Context part{ctx.seqs, ctx.slots, nullptr, &stream.shared};
    if (attn) {
      part.state = ctx.state ? &ctx.state->mixer[i] : nullptr;
      sublayer(*attn, *attn_norm_, stream, part, naive);
    }
    if (mlp) {
      part.state = ctx.state ? &ctx.state->feed_forward[i] : nullptr;
      sublayer(*mlp, *mlp_norm_, stream, part, naive);
    }
  }

  std::shared_ptr<Mixer> attn, mlp;  // null: none

 private:
  void sublayer(Mixer& mixer, RmsNorm& norm, Stream& stream, const Context& ctx, bool naive) {
    if (post_norm_) {
      stream.settle();
      stream.added = norm.forward(mixer.forward(stream.x, ctx), naive);
    } else {
      stream.added = mixer.forward(stream.normed(norm, naive), ctx);
    }
    stream.scale = scale_;
  }

  double scale_;
  bool post_norm_;
  std::shared_ptr<RmsNorm> attn_norm_, mlp_norm_;
};

// fla: normal weights and no bias for every linear map, convolution and embedding; the rest keeps
// what its module chose.
void initialize(torch::nn::Module& model, double range) {
  if (SkipInitialization::active()) return;
  c10::NoGradGuard no_grad;
  const auto reset = [range](at::Tensor weight, at::Tensor bias) {
    weight.normal_(0.0, range);
    if (bias.defined()) bias.zero_();
  };
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto* linear = dynamic_cast<Linear*>(module.get()); linear && !linear->keeps_initialisation)
      reset(linear->weight, linear->bias);
    if (auto* conv = dynamic_cast<ShortConvolution*>(module.get())) reset(conv->weight, conv->bias);
    if (auto* embedding = dynamic_cast<Embedding*>(module.get())) reset(embedding->weight, {});
  }
}

template <typename Map>
ModelState map_states(const ModelState& state, const Map& map) {
  ModelState result;
  for (const State& s : state.mixer) result.mixer.push_back(map(s));
  for (const State& s : state.feed_forward) result.feed_forward.push_back(map(s));
  return result;
}

}  // namespace

int64_t ModelState::num_sequences() const {
  for (const auto* states : {&mixer, &feed_forward}) {
    for (const State& state : *states) {
      if (!state.empty()) return state.num_sequences();
    }
  }
  return 0;
}

int64_t ModelState::bytes() const {
  int64_t sum = 0;
  for (const State& state : mixer) sum += state.bytes();
  for (const State& state : feed_forward) sum += state.bytes();
  return sum;
}

ModelState ModelState::clone() const {
  return map_states(*this, [](const State& state) { return state.clone(); });
}

ModelState ModelState::index(const at::Tensor& sequences) const {
  return map_states(*this, [&](const State& state) { return state.index(sequences); });
}

struct CausalLM::Impl {
  ModelConfig config;
  std::shared_ptr<Embedding> embeddings;
  std::vector<std::shared_ptr<Block>> blocks;
  std::shared_ptr<RmsNorm> norm;
  std::shared_ptr<Linear> lm_head;  // null: tied
  CastCache tied_head;
  at::ScalarType dtype = at::kFloat;
  bool checkpointing = false;
  bool naive = false;

  // Logits in the dtype of `hidden`.
  at::Tensor head(const at::Tensor& hidden) {
    if (lm_head) return lm_head->forward(hidden);
    const at::Tensor& weight = embeddings->weight;
    if (!ops::is_few_rows(hidden)) return ops::linear(hidden, weight.to(hidden.scalar_type()));
    const ops::Projection tied = tied_head.get(weight, {}, hidden.scalar_type());
    return ops::few_rows(hidden, std::span(&tied, 1))[0];
  }

  // Runs block i, keeping only its inputs for backward.
  void forward_recomputed(Stream& stream, const ModelContext& ctx, size_t i) {
    // Shared values that are absent are left out of the list of tensors; `present` says which are
    // in it.
    const auto pack = [](Stream& s, std::vector<at::Tensor>& list) {
      s.settle();
      list = {s.x};
      for (const at::Tensor* t : {&s.shared.first_value, &s.shared.auxiliary_loss}) {
        if (t->defined()) list.push_back(*t);
      }
      return std::pair(s.shared.first_value.defined(), s.shared.auxiliary_loss.defined());
    };
    const auto unpack = [](const std::vector<at::Tensor>& list, std::pair<bool, bool> present) {
      Stream s;
      size_t next = 0;
      s.x = list[next++];
      if (present.first) s.shared.first_value = list[next++];
      if (present.second) s.shared.auxiliary_loss = list[next++];
      return s;
    };
    std::vector<at::Tensor> inputs;
    const auto given = pack(stream, inputs);
    auto left = std::make_shared<std::pair<bool, bool>>();
    const auto block = blocks[i];
    const TensorsFn run = [=, naive = naive](const std::vector<at::Tensor>& tensors) {
      Stream s = unpack(tensors, given);
      block->forward(s, ctx, i, naive);
      std::vector<at::Tensor> outputs;
      *left = pack(s, outputs);
      return outputs;
    };
    const std::vector<at::Tensor> outputs = recompute_in_backward(run, inputs, block->parameters());
    stream = unpack(outputs, *left);
  }
};

CausalLM::CausalLM(ModelConfig config) : impl_(std::make_unique<Impl>()) {
  config.validate();
  impl_->config = std::move(config);
  const ModelConfig& c = impl_->config;
  const auto backbone = register_module("model", std::make_shared<torch::nn::Module>());
  impl_->embeddings = backbone->register_module(
      "embeddings", std::make_shared<Embedding>(c.vocab_size, c.hidden_size));
  const auto layers = backbone->register_module("layers", std::make_shared<torch::nn::Module>());
  for (size_t i = 0; i < c.blocks.size(); ++i) {
    impl_->blocks.push_back(
        layers->register_module(std::to_string(i), std::make_shared<Block>(c, i)));
  }
  impl_->norm =
      backbone->register_module("norm", std::make_shared<RmsNorm>(c.hidden_size, c.norm_eps));
  if (!c.tie_word_embeddings) {
    impl_->lm_head =
        register_module("lm_head", std::make_shared<Linear>(c.hidden_size, c.vocab_size));
  }
  for (size_t i = 0; i < c.blocks.size(); ++i) {
    const auto& mixer = impl_->blocks[i]->attn;
    if (mixer) impl_->config.blocks[i].mixer_options = mixer->options();
  }
  initialize(*this, c.initializer_range);
}

CausalLM::~CausalLM() = default;

at::Tensor CausalLM::hidden(const at::Tensor& ids, const ModelContext& ctx) {
  GDN_CHECK(ids.defined() && ids.dim() == 2 && ids.scalar_type() == at::kLong,
            "[causal_lm] ids must be int64 [B,T], got ",
            ids.defined() ? str_cat(ids.scalar_type(), " ", ops::shape_str(ids)) : "nothing");
  GDN_CHECK(!ctx.seqs.cu_seqlens.defined() || ids.size(0) == 1,
            "[causal_lm] packed ids must be [1,T], got ", ops::shape_str(ids));
  ModelContext checked = ctx;
  checked.seqs.cu_seqlens = ops::host_cu_seqlens("causal_lm", ctx.seqs.cu_seqlens, ids.size(1));
  if (ctx.state != nullptr) {
    GDN_CHECK(ctx.state->mixer.size() == impl_->blocks.size() &&
                  ctx.state->feed_forward.size() == impl_->blocks.size(),
              "[causal_lm] the state is of ", ctx.state->mixer.size(), " blocks, the model has ",
              impl_->blocks.size());
  }
  Stream stream;
  if (ctx.shared != nullptr) stream.shared = *ctx.shared;
  stream.shared.first_value.reset();  // of these tokens only
  stream.x = at::embedding(impl_->embeddings->weight, ids).to(impl_->dtype);  // [B,T,D]
  const bool recompute =
      impl_->checkpointing && ctx.state == nullptr && c10::GradMode::is_enabled();
  for (size_t i = 0; i < impl_->blocks.size(); ++i) {
    if (recompute) {
      impl_->forward_recomputed(stream, checked, i);
    } else {
      impl_->blocks[i]->forward(stream, checked, i, impl_->naive);
    }
  }
  if (ctx.shared != nullptr) *ctx.shared = stream.shared;
  return stream.normed(*impl_->norm, impl_->naive);
}

at::Tensor CausalLM::logits(const at::Tensor& hidden) {
  const at::Tensor y = impl_->head(hidden);
  return y.scalar_type() == at::kDouble ? y : y.to(at::kFloat);
}

at::Tensor CausalLM::loss(const at::Tensor& ids, const at::Tensor& targets,
                          const ModelContext& ctx) {
  GDN_CHECK(
      targets.defined() && targets.scalar_type() == at::kLong && targets.sizes() == ids.sizes(),
      "[causal_lm] targets must be int64 with the shape of ids ", ops::shape_str(ids), ", got ",
      targets.defined() ? ops::shape_str(targets) : "nothing");
  at::Tensor flat_targets = targets.reshape({-1});
  Shared own;
  ModelContext with_shared = ctx;
  if (with_shared.shared == nullptr) with_shared.shared = &own;
  at::Tensor h = hidden(ids, with_shared).reshape({-1, impl_->config.hidden_size});  // [B*T,D]
  const at::Tensor scored = at::nonzero(at::ne(flat_targets, kNoTarget)).reshape({-1});
  if (scored.numel() == 0)
    return h.sum().to(at::kFloat) * 0;  // nothing to predict: no loss, no gradient
  if (scored.numel() < flat_targets.numel()) {
    h = at::index_select(h, 0, scored);
    flat_targets = at::index_select(flat_targets, 0, scored);
  }
  impl_->tied_head.clear();
  if (impl_->lm_head) impl_->lm_head->forget_casts();
  const at::Tensor& weight = impl_->lm_head ? impl_->lm_head->weight : impl_->embeddings->weight;
  const at::Tensor loss = ops::linear_cross_entropy(h, weight, flat_targets);
  const at::Tensor& auxiliary = with_shared.shared->auxiliary_loss;
  return c10::GradMode::is_enabled() && auxiliary.defined() ? loss + auxiliary : loss;
}

ModelState CausalLM::zero_state(int64_t sequences) const {
  const at::TensorOptions options =
      impl_->embeddings->weight.options().dtype(impl_->dtype).requires_grad(false);
  ModelState state;
  for (const auto& block : impl_->blocks) {
    state.mixer.push_back(block->attn ? block->attn->zero_state(sequences, options) : State());
    state.feed_forward.push_back(block->mlp ? block->mlp->zero_state(sequences, options) : State());
  }
  return state;
}

void CausalLM::set_compute_dtype(at::ScalarType dtype) {
  GDN_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble,
            "[causal_lm] the compute dtype must be float32, bfloat16 or float64, got ", dtype);
  impl_->dtype = dtype;
}

void CausalLM::set_gradient_checkpointing(bool on) { impl_->checkpointing = on; }

void CausalLM::use_naive(bool on) {
  impl_->naive = on;
  for (const auto& block : impl_->blocks) {
    if (block->attn) block->attn->use_naive(on);
    if (block->mlp) block->mlp->use_naive(on);
  }
}

const ModelConfig& CausalLM::config() const { return impl_->config; }

}  // namespace gdn
