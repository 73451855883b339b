// SPDX-License-Identifier: Apache-2.0
// What a language model is made of. Torch-free, so that parsers can be fuzzed and tools can read
// configurations.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace gdn {

enum class NormPlace : uint8_t {
  kPre,
  kPost
};  // norm before the sublayer, or on its output (OLMo)

// One residual block: x += scale * mixer(norm(x)), then x += scale * feed_forward(norm(x)); either
// may be absent.
struct BlockConfig {
  std::string mixer = "gated_delta_net";  // "" for none
  nlohmann::json mixer_options = nlohmann::json::object();
  // "swiglu" (options: intermediate_size), "rwkv_channel_mix" (intermediate_size), "moe"
  // (num_experts, num_experts_per_tok, moe_intermediate_size, shared_expert_intermediate_size,
  // norm_topk_prob, router_aux_loss_coef; Qwen's names), or "" for none.
  std::string feed_forward = "swiglu";
  nlohmann::json feed_forward_options = nlohmann::json::object();
  NormPlace norm_place = NormPlace::kPre;
  double residual_scale = 1.0;
  bool operator==(const BlockConfig&) const = default;
};

struct ModelConfig {
  int64_t vocab_size = 32000;
  int64_t hidden_size = 2048;
  std::vector<BlockConfig> blocks;
  int64_t hidden_ratio = 4;  // of SwiGLU, when intermediate_size is absent
  std::optional<int64_t> intermediate_size;
  double norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tie_word_embeddings = false;
  int64_t max_position_embeddings = 2048;
  std::optional<int64_t> bos_token_id, eos_token_id, pad_token_id;
  bool operator==(const ModelConfig&) const = default;

  // Throws UsageError naming the field and the rule.
  void validate() const;
  // SwiGLU's inner width: intermediate_size, or 256 * ceil(int(hidden_size * hidden_ratio * 2 / 3)
  // / 256).
  int64_t ffn_size() const;
};

// config.json. Models that fla's GatedDeltaNetConfig, DeltaNetConfig or KDAConfig can express are
// written with its fields and model_type ("gated_deltanet", "delta_net", "kda"), all others with
// model_type "gdn" and a list "blocks"; these are read, and fla's "gla".
nlohmann::json to_json(const ModelConfig& config);
ModelConfig model_config_from_json(const nlohmann::json& json);

}  // namespace gdn
