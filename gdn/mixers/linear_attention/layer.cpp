// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/linear_attention/layer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>

#include <cmath>

namespace gdn {
namespace {

constexpr const char* kName = "linear_attention";

// A function of single elements, without parameters.
class Elementwise : public FeatureMap {
 public:
  explicit Elementwise(std::string name) : name_(std::move(name)) {}
  at::Tensor forward(const at::Tensor& x) override { return feature_map(name_, x); }

 private:
  std::string name_;
};

// The product of two linear maps, as fla's HadamardFeatureMap: quadratic features of x.
class Hadamard : public FeatureMap {
 public:
  explicit Hadamard(int64_t K)
      : layer1_(add_linear(*this, "layer1", K, K, true)),
        layer2_(add_linear(*this, "layer2", K, K, true)) {}
  at::Tensor forward(const at::Tensor& x) override {
    return layer1_->forward(x) * layer2_->forward(x);
  }

 private:
  std::shared_ptr<Linear> layer1_, layer2_;
};

// Performer's positive random features, whose expected product is exp(x.y / sqrt(K)): with
// x' = x / K^(1/4), phi(x)_i = exp(w_i.x' - |x'|^2 / 2) / sqrt(features). The w_i come from a seed
// and are no parameters.
class PositiveRandom : public FeatureMap {
 public:
  PositiveRandom(int64_t K, int64_t features, int64_t seed)
      : directions_(at::randn({features, K},
                              at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed)),
                              at::kDouble)) {}
  at::Tensor forward(const at::Tensor& x) override {
    // Exponentials are taken in the dtype of states.
    const at::Tensor scaled =
        x.to(ops::acc_type(x.scalar_type())) / std::pow(static_cast<double>(x.size(-1)), 0.25);
    const at::Tensor w = directions_.to(scaled.options());
    const at::Tensor half_square = (scaled * scaled).sum(-1, /*keepdim=*/true) / 2;
    const at::Tensor phi =
        at::exp(at::linear(scaled, w) - half_square) / std::sqrt(static_cast<double>(w.size(0)));
    return phi.to(x.scalar_type());
  }

 private:
  at::Tensor directions_;  // [features,K]
};

}  // namespace

LinearAttention::LinearAttention(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_width(options, D);
  num_kv_heads_ = kv_heads(options, sizes_.H);
  const std::string map =
      options.text("feature_map", {"elementwise_product", "elu", "relu", "identity", "performer"});
  norm_q_ = options.flag("norm_q");
  norm_k_ = options.flag("norm_k");
  normalize_ = options.flag("do_feature_map_norm");
  const bool positive = map == "elu" || map == "relu" || map == "performer";
  for (const char* name : {"norm_q", "norm_k", "do_feature_map_norm"}) {
    options.check(positive || !options.flag(name), name,
                  " divides by a sum of features and needs a feature_map without negative values "
                  "(elu, relu, performer), got \"",
                  map, "\"");
  }
  options.check(map == "performer" || !options.given("num_features"),
                "num_features is for feature_map \"performer\", got \"", map, "\"");
  features_ = map == "performer" ? options.positive_or("num_features", 2 * sizes_.K) : sizes_.K;
  const bool tied = options.flag("tie_feature_map_qk");

  // Queries and keys must see the same random features.
  const int64_t seed = args.layer_idx;
  const auto make = [&]() -> std::shared_ptr<FeatureMap> {
    if (map == "elementwise_product") return std::make_shared<Hadamard>(sizes_.K);
    if (map == "performer") return std::make_shared<PositiveRandom>(sizes_.K, features_, seed);
    return std::make_shared<Elementwise>(map);
  };
  feature_map_q_ = register_module("feature_map_q", make());
  feature_map_k_ = register_module("feature_map_k", tied ? feature_map_q_ : make());
  add_qkv(D);
  const bool norm = options.text("output_norm", {"rmsnorm", "identity"}) == "rmsnorm";
  add_output(options, args, {norm ? "norm" : nullptr, ""});
}

HeadSizes LinearAttention::state_sizes() const {
  // With the normaliser the values have one more channel, which is always 1.
  return {sizes_.H, sizes_.HV, features_, sizes_.V + (normalize_ ? 1 : 0)};
}

DeltaInputs LinearAttention::inputs(const at::Tensor& x, StateAccess& state) {
  const auto by_sum = [](const at::Tensor& phi) {
    return phi / (phi.sum(-1, /*keepdim=*/true) + 1e-4);
  };
  DeltaInputs in = project(x, state);
  in.erase = "none";
  in.q = feature_map_q_->forward(in.q);
  in.k = feature_map_k_->forward(in.k);
  if (norm_q_) in.q = by_sum(in.q);
  if (norm_k_) in.k = by_sum(in.k);
  if (normalize_) in.v = at::constant_pad_nd(in.v, {0, 1}, 1);
  return in;
}

at::Tensor LinearAttention::output(const at::Tensor& o, const at::Tensor& x) {
  if (!normalize_) return DeltaMixer::output(o, x);
  const int64_t V = sizes_.V;
  return DeltaMixer::output(o.narrow(3, 0, V) / (o.narrow(3, V, 1) + 1e-10), x);
}

MixerInfo linear_attention_info() {
  return {
      kName,
      "Linear attention",
      "arXiv 2006.16236",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           width_options(expand_k_option(1.0), 1.0),
           {kv_heads_option(),
            {"feature_map", "elementwise_product",
             "of queries and keys: elementwise_product (of two linear maps), elu (plus 1), relu, "
             "identity, performer (positive random features)"},
            {"tie_feature_map_qk", false, "one feature map for queries and keys"},
            {"num_features", nullptr,
             "random features per head of feature_map performer; default: twice the size of a "
             "key"},
            {"do_feature_map_norm", false,
             "divide by the sum of the weights q.k of the tokens so far"},
            {"norm_q", false, "divide the features of a query by their sum"},
            {"norm_k", false, "divide the features of a key by their sum"},
            {"output_norm", "rmsnorm", "norm over each head of the output: rmsnorm, identity"},
            norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<LinearAttention>(args);
      },
  };
}

}  // namespace gdn
