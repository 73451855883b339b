// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/config.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string_view>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/names.h"

namespace gdn {
namespace {

using Json = nlohmann::json;

// Far above any real model, and small enough that no product of two of them overflows.
constexpr int64_t kMaxVocab = 1 << 24, kMaxWidth = 1 << 20, kMaxLayers = 4096, kMaxRatio = 1024;

template <typename... Args>
void require(bool condition, const Args&... message) {
  if (!condition) throw UsageError(str_cat("[config] ", message...));
}

// Typed access to the fields of one JSON object; absent and null mean the default.
class Fields {
 public:
  Fields(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    require(json.is_object(), where_, " must be an object, got ", json.type_name());
  }

  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  const Json& at(const char* key) const {
    require(has(key), where_, ": ", key, " is missing");
    return json_[key];
  }
  int64_t integer(const char* key, int64_t fallback) const {
    return optional_integer(key).value_or(fallback);
  }
  std::optional<int64_t> optional_integer(const char* key) const {
    if (!has(key)) return std::nullopt;
    const Json& value = json_[key];
    require(value.is_number_integer() &&
                !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}),
            where_, ": ", key, " must be an integer, got ", value.dump());
    return value.get<int64_t>();
  }
  double number(const char* key, double fallback) const {
    if (!has(key)) return fallback;
    require(json_[key].is_number(), where_, ": ", key, " must be a number, got ",
            json_[key].dump());
    return json_[key].get<double>();
  }
  bool boolean(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    require(json_[key].is_boolean(), where_, ": ", key, " must be true or false, got ",
            json_[key].dump());
    return json_[key].get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    require(json_[key].is_string(), where_, ": ", key, " must be a string, got ",
            json_[key].dump());
    return json_[key].get<std::string>();
  }
  Json object(const char* key) const {
    if (!has(key)) return Json::object();
    require(json_[key].is_object(), where_, ": ", key, " must be an object, got ",
            json_[key].dump());
    return json_[key];
  }
  void reject_unknown(const std::vector<std::string>& known) const {
    for (const auto& [key, value] : json_.items()) {
      require(std::find(known.begin(), known.end(), key) != known.end(), where_, ": unknown key \"",
              key, "\"", did_you_mean(key, known));
    }
  }

 private:
  const Json& json_;
  std::string where_;
};

// --- fla's forms
// ------------------------------------------------------------------------------------------------

constexpr const char* kKda = "kimi_delta_attention";

// A mixer's option, its field in fla's configuration, and fla's default.
struct FlaField {
  const char* option;
  const char* field;
  Json fallback;
};

struct FlaForm {
  const char* model_type;
  const char* architecture;
  const char* mixer;
  int64_t num_layers;
  std::vector<FlaField> fields;
  bool written = true;  // else models of it are written in our form, which gdn.models reads
};

const std::vector<FlaForm>& fla_forms() {
  static const std::vector<FlaForm> forms = {
      {"gated_deltanet",
       "GatedDeltaNetForCausalLM",
       "gated_delta_net",
       21,
       {{"mode", "attn_mode", "chunk"},
        {"expand_v", "expand_v", 2.0},
        {"head_dim", "head_dim", 256},
        {"num_heads", "num_heads", 6},
        {"num_v_heads", "num_v_heads", nullptr},
        {"use_gate", "use_gate", true},
        {"use_short_conv", "use_short_conv", true},
        {"conv_size", "conv_size", 4},
        {"allow_neg_eigval", "allow_neg_eigval", false},
        {"output_gate_activation", "output_gate_activation", "swish"}}},
      {"delta_net",
       "DeltaNetForCausalLM",
       "delta_net",
       24,
       {{"mode", "attn_mode", "chunk"},
        {"expand_k", "expand_k", 1.0},
        {"expand_v", "expand_v", 1.0},
        {"num_heads", "num_heads", 16},
        {"use_beta", "use_beta", true},
        {"allow_neg_eigval", "allow_neg_eigval", false},
        {"use_gate", "use_gate", false},
        {"use_short_conv", "use_short_conv", true},
        {"conv_size", "conv_size", 4},
        {"qk_norm", "qk_norm", "l2"},
        {"qk_activation", "qk_activation", "silu"}}},
      {"kda",
       "KDAForCausalLM",
       kKda,
       24,
       {{"mode", "attn_mode", "chunk"},
        {"expand_v", "expand_v", 1.0},
        {"head_dim", "head_dim", 128},
        {"num_heads", "num_heads", 16},
        {"num_v_heads", "num_v_heads", nullptr},
        {"use_short_conv", "use_short_conv", true},
        {"conv_size", "conv_size", 4},
        {"allow_neg_eigval", "allow_neg_eigval", false},
        {"safe_gate", "safe_gate", false},
        {"lower_bound", "lower_bound", nullptr}}},
      {"gla",
       "GLAForCausalLM",
       "gla",
       24,
       {{"mode", "attn_mode", "chunk"},
        {"expand_k", "expand_k", 0.5},
        {"expand_v", "expand_v", 1.0},
        {"num_heads", "num_heads", 4},
        {"num_kv_heads", "num_kv_heads", nullptr},
        {"feature_map", "feature_map", "identity"},
        {"use_short_conv", "use_short_conv", false},
        {"conv_size", "conv_size", 4},
        {"use_output_gate", "use_output_gate", true},
        {"clamp_min", "clamp_min", nullptr}},
       /*written=*/false},
  };
  return forms;
}

// fla's hybrid layers; num_heads has no default.
const std::vector<FlaField>& attention_fields() {
  static const std::vector<FlaField> fields = {{"num_heads", "num_heads", nullptr},
                                               {"num_kv_heads", "num_kv_heads", nullptr},
                                               {"qkv_bias", "qkv_bias", false},
                                               {"window_size", "window_size", nullptr},
                                               {"rope_theta", "rope_theta", 10000.0}};
  return fields;
}

// Whether an option that fla's form has no field for says what fla's layer does anyway.
bool is_flas_way(const std::string& key, const Json& value, const BlockConfig& block,
                 const ModelConfig& config) {
  if (value.is_null()) return true;
  const bool attention = block.mixer == "attention";
  if (key == "erase") return value == Json(true);
  if (key == "norm_eps") {
    return value == Json(config.norm_eps) ||
           (attention && !block.mixer_options.value("qk_norm", false));
  }
  if (key == "head_dim" && attention) {
    const Json& heads = block.mixer_options.at("num_heads");
    return heads.get<int64_t>() * value.get<int64_t>() == config.hidden_size;
  }
  return value == Json(false);
}

// Whether fla's fields say all that the options of this block say.
bool expressible(const BlockConfig& block, const std::vector<FlaField>& fields,
                 const ModelConfig& config) {
  const Json& options = block.mixer_options;
  for (const FlaField& field : fields) {
    const bool required =
        !field.fallback.is_null() || field.option == std::string_view("num_heads");
    if (!options.contains(field.option) || (required && options[field.option].is_null()))
      return false;
  }
  if (block.mixer == "attention" && options["rope_theta"] == 0) return false;  // fla always rotates
  return std::all_of(options.items().begin(), options.items().end(), [&](const auto& item) {
    const bool has_field = std::any_of(fields.begin(), fields.end(), [&](const FlaField& field) {
      return item.key() == field.option;
    });
    return has_field || is_flas_way(item.key(), item.value(), block, config);
  });
}

// The form that can express the model, or null.
const FlaForm* find_form(const ModelConfig& config) {
  const FlaForm* form = nullptr;
  const Json* options = nullptr;  // all layers of the form's mixer must have the same
  for (const BlockConfig& block : config.blocks) {
    if (block.feed_forward != "swiglu" || !block.feed_forward_options.empty() ||
        block.residual_scale != 1.0 || block.norm_place != NormPlace::kPre) {
      return nullptr;
    }
    if (block.mixer == "attention") {
      if (!expressible(block, attention_fields(), config)) return nullptr;
      continue;
    }
    if (form == nullptr) {
      for (const FlaForm& candidate : fla_forms()) {
        if (block.mixer == candidate.mixer && candidate.written) form = &candidate;
      }
      if (form == nullptr || !expressible(block, form->fields, config)) return nullptr;
      options = &block.mixer_options;
    } else if (block.mixer != form->mixer || block.mixer_options != *options) {
      return nullptr;
    }
  }
  return form;
}

void write_fla(const ModelConfig& config, const FlaForm& form, Json& json) {
  json["model_type"] = form.model_type;
  json["architectures"] = {form.architecture};
  json["num_hidden_layers"] = config.blocks.size();
  json["hidden_act"] = "swish";
  Json attn = Json::array();
  for (size_t i = 0; i < config.blocks.size(); ++i) {
    const Json& options = config.blocks[i].mixer_options;
    if (config.blocks[i].mixer != "attention") {
      for (const FlaField& field : form.fields) json[field.field] = options.at(field.option);
      // To fla a bound means the safe gate.
      if (form.mixer == kKda && json["safe_gate"] == false) json["lower_bound"] = nullptr;
      continue;
    }
    Json spec;
    for (const FlaField& field : attention_fields()) spec[field.field] = options.at(field.option);
    if (spec["window_size"] == 0) spec["window_size"] = nullptr;
    if (spec["num_kv_heads"].is_null()) spec["num_kv_heads"] = spec["num_heads"];
    auto same = std::find_if(attn.begin(), attn.end(), [&](Json other) {
      other.erase("layers");
      return other == spec;
    });
    if (same != attn.end()) {
      (*same)["layers"].push_back(i);
    } else {
      spec["layers"] = {i};
      attn.push_back(spec);
    }
  }
  json["attn"] = attn.empty() ? Json() : attn.size() == 1 ? attn[0] : attn;
}

Json read_options(const Json& json, const std::vector<FlaField>& fields) {
  Json options = Json::object();
  for (const FlaField& field : fields) {
    const bool given = json.contains(field.field) && !json[field.field].is_null();
    options[field.option] = given ? json[field.field] : field.fallback;
  }
  return options;
}

void read_attention(const Json& spec, std::vector<BlockConfig>& blocks, std::set<int64_t>& taken) {
  const Fields fields(spec, "attn");
  std::vector<std::string> known = {"layers"};
  for (const FlaField& field : attention_fields()) known.push_back(field.field);
  fields.reject_unknown(known);
  require(fields.integer("num_heads", 0) >= 1, "attn: num_heads must be an integer >= 1");
  const Json& layers = fields.at("layers");
  require(layers.is_array(), "attn: layers must be a list of layer indices");
  const int64_t count = static_cast<int64_t>(blocks.size());
  for (const Json& layer : layers) {
    const int64_t i = layer.is_number_integer() ? layer.get<int64_t>() : -1;
    require(i >= 0 && i < count, "attn: layers must lie in [0, ", count, "), got ", layer.dump());
    require(taken.insert(i).second, "attn: layer ", i, " is named twice");
    blocks[static_cast<size_t>(i)].mixer = "attention";
    blocks[static_cast<size_t>(i)].mixer_options = read_options(spec, attention_fields());
  }
}

void read_fla(const Json& json, const FlaForm& form, ModelConfig& config) {
  const Fields fields(json, "config.json");
  const std::string act = fields.text("hidden_act", "swish");
  require(act == "swish" || act == "silu", "hidden_act must be \"swish\", got \"", act, "\"");
  require(!fields.has("attnres_block_size"),
          "attnres_block_size (attention residuals) is not supported");
  const std::pair<const char*, bool> fixed[] = {
      {"use_output_norm", true}, {"elementwise_affine", true}, {"use_gk", true}, {"use_gv", false}};
  for (const auto& [key, value] : fixed) {
    require(fields.boolean(key, value) == value, key, value ? " false" : " true",
            " is not supported");
  }
  const int64_t layers = fields.integer("num_hidden_layers", form.num_layers);
  require(layers >= 1 && layers <= kMaxLayers, "num_hidden_layers must be in [1, ", kMaxLayers,
          "], got ", layers);
  BlockConfig block;
  block.mixer = form.mixer;
  block.mixer_options = read_options(json, form.fields);
  if (form.mixer == kKda) {
    const bool bounded = fields.has("lower_bound");
    require(bounded || !fields.boolean("safe_gate", false), "safe_gate needs lower_bound");
    block.mixer_options["safe_gate"] = bounded;
  }
  config.blocks.assign(static_cast<size_t>(layers), block);
  if (!fields.has("attn")) return;
  std::set<int64_t> taken;
  const Json& attn = json["attn"];
  if (attn.is_array()) {
    for (const Json& spec : attn) read_attention(spec, config.blocks, taken);
  } else {
    read_attention(attn, config.blocks, taken);
  }
}

// --- our own form
// ---------------------------------------------------------------------------------------------------

Json block_to_json(const BlockConfig& block) {
  return {{"mixer", block.mixer},
          {"mixer_options", block.mixer_options},
          {"feed_forward", block.feed_forward},
          {"feed_forward_options", block.feed_forward_options},
          {"norm_place", block.norm_place == NormPlace::kPre ? "pre" : "post"},
          {"residual_scale", block.residual_scale}};
}

BlockConfig block_from_json(const Json& json, size_t i) {
  const std::string where = str_cat("blocks[", i, "]");
  const Fields fields(json, where);
  fields.reject_unknown({"mixer", "mixer_options", "feed_forward", "feed_forward_options",
                         "norm_place", "residual_scale"});
  BlockConfig block;
  block.mixer = fields.text("mixer", block.mixer);
  block.mixer_options = fields.object("mixer_options");
  block.feed_forward = fields.text("feed_forward", block.feed_forward);
  block.feed_forward_options = fields.object("feed_forward_options");
  const std::string place = fields.text("norm_place", "pre");
  require(place == "pre" || place == "post", where,
          ": norm_place must be \"pre\" or \"post\", got \"", place, "\"");
  block.norm_place = place == "pre" ? NormPlace::kPre : NormPlace::kPost;
  block.residual_scale = fields.number("residual_scale", 1.0);
  return block;
}

void read_own(const Json& json, ModelConfig& config) {
  const Fields fields(json, "config.json");
  fields.reject_unknown({"model_type", "architectures", "vocab_size", "hidden_size", "hidden_ratio",
                         "intermediate_size", "norm_eps", "initializer_range",
                         "tie_word_embeddings", "max_position_embeddings", "bos_token_id",
                         "eos_token_id", "pad_token_id", "dtype", "blocks"});
  const Json& blocks = fields.at("blocks");
  require(blocks.is_array(), "blocks must be a list");
  for (size_t i = 0; i < blocks.size(); ++i) config.blocks.push_back(block_from_json(blocks[i], i));
}

Json or_null(const std::optional<int64_t>& value) { return value ? Json(*value) : Json(); }

// A token id; null and the -1 of some older files mean none.
std::optional<int64_t> read_token(const Fields& fields, const char* key,
                                  std::optional<int64_t> fallback, bool given) {
  if (!given) return fallback;
  const auto id = fields.optional_integer(key);
  return id == -1 ? std::nullopt : id;
}

// Name and options of the feed-forward.
void validate_feed_forward(const BlockConfig& block, const std::string& where) {
  const std::string& name = block.feed_forward;
  if (name.empty()) {
    require(block.feed_forward_options.empty(), where,
            "feed_forward_options without a feed_forward");
    return;
  }
  const Fields options(block.feed_forward_options, where + "feed_forward_options");
  const auto size = [&](const char* key, int64_t low, int64_t high, int64_t fallback) {
    const int64_t value = options.integer(key, fallback);
    require(value >= low && value <= high, where, key, " must be in [", low, ", ", high, "], got ",
            value);
    return value;
  };
  if (name == "swiglu" || name == "rwkv_channel_mix") {
    options.reject_unknown({"intermediate_size"});
    size("intermediate_size", 1, kMaxWidth * 8, 1);
  } else if (name == "moe") {
    options.reject_unknown({"num_experts", "num_experts_per_tok", "moe_intermediate_size",
                            "shared_expert_intermediate_size", "norm_topk_prob",
                            "router_aux_loss_coef"});
    const int64_t experts = size("num_experts", 1, 65536, 8);
    size("num_experts_per_tok", 1, experts, std::min<int64_t>(2, experts));
    size("moe_intermediate_size", 1, kMaxWidth * 8, 1);
    size("shared_expert_intermediate_size", 0, kMaxWidth * 8, 0);
    options.boolean("norm_topk_prob", true);
    const double balance = options.number("router_aux_loss_coef", 0);
    require(std::isfinite(balance) && balance >= 0, where,
            "router_aux_loss_coef must not be negative, got ", balance);
  } else {
    const std::vector<std::string> known = {"swiglu", "moe", "rwkv_channel_mix"};
    require(false, where, "unknown feed_forward \"", name, "\"", did_you_mean(name, known),
            " (known: \"swiglu\", \"moe\", \"rwkv_channel_mix\", or \"\" for none)");
  }
}

}  // namespace

int64_t ModelConfig::ffn_size() const {
  if (intermediate_size) return *intermediate_size;
  const int64_t size = hidden_size * hidden_ratio * 2 / 3;
  return 256 * ((size + 255) / 256);
}

void ModelConfig::validate() const {
  const auto in_range = [](const char* name, int64_t value, int64_t low, int64_t high) {
    require(value >= low && value <= high, name, " must be in [", low, ", ", high, "], got ",
            value);
  };
  in_range("vocab_size", vocab_size, 1, kMaxVocab);
  in_range("hidden_size", hidden_size, 1, kMaxWidth);
  in_range("hidden_ratio", hidden_ratio, 1, kMaxRatio);
  if (intermediate_size) in_range("intermediate_size", *intermediate_size, 1, kMaxWidth * 8);
  in_range("max_position_embeddings", max_position_embeddings, 1, int64_t{1} << 40);
  require(std::isfinite(norm_eps) && norm_eps > 0, "norm_eps must be positive, got ", norm_eps);
  require(std::isfinite(initializer_range) && initializer_range >= 0,
          "initializer_range must not be negative, got ", initializer_range);
  const std::pair<const char*, const std::optional<int64_t>*> tokens[] = {
      {"bos_token_id", &bos_token_id},
      {"eos_token_id", &eos_token_id},
      {"pad_token_id", &pad_token_id}};
  for (const auto& [name, id] : tokens) {
    if (*id) require(**id >= 0, name, " must not be negative, got ", **id);
  }
  require(!blocks.empty(), "a model needs at least one block");
  require(static_cast<int64_t>(blocks.size()) <= kMaxLayers, "a model has at most ", kMaxLayers,
          " blocks, got ", blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    const BlockConfig& block = blocks[i];
    const std::string where = str_cat("blocks[", i, "]: ");
    require(block.mixer_options.is_object() && block.feed_forward_options.is_object(), where,
            "options must be objects");
    require(std::isfinite(block.residual_scale), where, "residual_scale must be finite");
    validate_feed_forward(block, where);
  }
}

nlohmann::json to_json(const ModelConfig& config) {
  Json json = {{"vocab_size", config.vocab_size},
               {"hidden_size", config.hidden_size},
               {"hidden_ratio", config.hidden_ratio},
               {"intermediate_size", or_null(config.intermediate_size)},
               {"norm_eps", config.norm_eps},
               {"initializer_range", config.initializer_range},
               {"tie_word_embeddings", config.tie_word_embeddings},
               {"max_position_embeddings", config.max_position_embeddings},
               {"bos_token_id", or_null(config.bos_token_id)},
               {"eos_token_id", or_null(config.eos_token_id)},
               {"pad_token_id", or_null(config.pad_token_id)},
               {"dtype", "float32"}};
  if (const FlaForm* form = find_form(config)) {
    write_fla(config, *form, json);
    return json;
  }
  json["model_type"] = "gdn";
  json["architectures"] = {"GdnForCausalLM"};
  for (const BlockConfig& block : config.blocks) json["blocks"].push_back(block_to_json(block));
  return json;
}

ModelConfig model_config_from_json(const nlohmann::json& json) {
  const Fields fields(json, "config.json");
  const std::string type = fields.text("model_type", "");
  const FlaForm* form = nullptr;
  std::vector<std::string> known = {"gdn"};
  for (const FlaForm& candidate : fla_forms()) {
    if (type == candidate.model_type) form = &candidate;
    known.push_back(candidate.model_type);
  }
  require(form != nullptr || type == "gdn", "unknown model_type \"", type, "\"",
          did_you_mean(type, known), "; known: gdn, gated_deltanet, delta_net, kda, gla");
  ModelConfig config;
  config.vocab_size = fields.integer("vocab_size", config.vocab_size);
  config.hidden_size = fields.integer("hidden_size", config.hidden_size);
  config.hidden_ratio = fields.integer("hidden_ratio", config.hidden_ratio);
  config.intermediate_size = fields.optional_integer("intermediate_size");
  config.norm_eps = fields.number("norm_eps", config.norm_eps);
  config.initializer_range = fields.number("initializer_range", config.initializer_range);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", config.tie_word_embeddings);
  config.max_position_embeddings =
      fields.integer("max_position_embeddings", config.max_position_embeddings);
  // fla's classes have bos 1 and eos 2 where the file says nothing; a written null means none.
  const auto token = [&](const char* key, std::optional<int64_t> fla_default) {
    return read_token(fields, key, form != nullptr ? fla_default : std::nullopt,
                      json.contains(key));
  };
  config.bos_token_id = token("bos_token_id", 1);
  config.eos_token_id = token("eos_token_id", 2);
  config.pad_token_id = token("pad_token_id", std::nullopt);
  if (form != nullptr) {
    read_fla(json, *form, config);
  } else {
    read_own(json, config);
  }
  config.validate();
  return config;
}

}  // namespace gdn
