// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/base/names.h"
#include "gdn/train/toml.h"

namespace gdn {
namespace {

using nlohmann::json;

constexpr double kAny = std::numeric_limits<double>::infinity();
constexpr double kTiny = std::numeric_limits<double>::min();  // "above zero"

[[noreturn]] void usage(const std::string& message) { throw UsageError("[config] " + message); }

std::string toml_string(const std::string& text) {
  // A JSON string is a TOML basic string, but for the one control character JSON leaves alone.
  std::string out = json(text).dump(-1, ' ', false, json::error_handler_t::replace);
  for (size_t at; (at = out.find('\x7f')) != std::string::npos;) out.replace(at, 1, "\\u007f");
  return out;
}

std::string toml_number(double x) {
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, x).ptr;
  std::string text(buffer, end);
  if (text.find_first_of(".en") == std::string::npos) text += ".0";
  return text;
}

bool is_bare_key(const std::string& key) {
  return !key.empty() && std::all_of(key.begin(), key.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '-';
  });
}

std::string toml_key(const std::string& key) { return is_bare_key(key) ? key : toml_string(key); }

std::string toml_value(const json& value) {
  switch (value.type()) {
    case json::value_t::number_float:
      return toml_number(value.get<double>());
    case json::value_t::string:
      return toml_string(value.get<std::string>());
    case json::value_t::array: {
      std::string out = "[";
      for (const json& item : value) out += (out.size() > 1 ? ", " : "") + toml_value(item);
      return out + "]";
    }
    case json::value_t::object: {
      std::string out = "{";
      for (const auto& [key, item] : value.items())
        out += (out.size() > 1 ? ", " : " ") + toml_key(key) + " = " + toml_value(item);
      return out + " }";
    }
    default:
      return value.dump();
  }
}

json to_json(const toml::node& node, const std::string& where) {
  if (const auto* table = node.as_table()) {
    json out = json::object();
    for (const auto& [key, value] : *table) {
      const std::string name(key.str());
      out[name] = to_json(value, where + (where.ends_with(' ') ? "" : ".") + name);
    }
    return out;
  }
  if (const auto* array = node.as_array()) {
    json out = json::array();
    for (const toml::node& value : *array) out.push_back(to_json(value, where));
    return out;
  }
  if (const auto* value = node.as_boolean()) return value->get();
  if (const auto* value = node.as_integer()) return value->get();
  if (const auto* value = node.as_floating_point()) {
    if (!std::isfinite(value->get())) usage(where + " must be a finite number");
    return value->get();
  }
  if (const auto* value = node.as_string()) return value->get();
  usage(where +
        " must be a number, a string, true or false, an array or a table, not a date or time");
}

std::string kind_of(const json& value) {
  return value.is_string()    ? "a string"
         : value.is_boolean() ? "true or false"
         : value.is_array()   ? "an array"
         : value.is_object()  ? "a table"
                              : "a number";
}

std::vector<std::string> keys_of(std::initializer_list<const char*> names) {
  return {names.begin(), names.end()};
}

const json& expect_table(const json& value, const std::string& where) {
  if (!value.is_object()) usage(where + " must be a table, got " + kind_of(value));
  return value;
}

std::string expect_string(const json& value, const std::string& where) {
  if (!value.is_string()) usage(where + " must be a string, got " + kind_of(value));
  return value.get<std::string>();
}

// A string, or a table with `name` and the mixer's options.
MixerChoice parse_mixer(const json& value, const std::string& where) {
  if (value.is_string()) return {value.get<std::string>()};
  MixerChoice mixer;
  if (!value.is_object())
    usage(where + " must be a mixer's name or a table with a key \"name\", got " + kind_of(value));
  mixer.options = value;
  if (auto name = mixer.options.find("name"); name != mixer.options.end()) {
    mixer.name = expect_string(*name, where + ".name");
    mixer.options.erase(name);
  }
  return mixer;
}

LayerPattern parse_layer(const json& value, const std::string& where,
                         const RunConfig::Model& model) {
  LayerPattern layer;
  layer.mixer = model.mixer;
  for (const auto& [key, item] : expect_table(value, where).items()) {
    const std::string at = where + "." + key;
    if (key == "mixer") {
      layer.mixer = parse_mixer(item, at);
    } else if (key == "feed_forward") {
      layer.feed_forward = expect_string(item, at);
    } else if (key == "feed_forward_options") {
      layer.feed_forward_options = expect_table(item, at);
    } else if (key == "norm_place") {
      layer.norm_place = expect_string(item, at);
      if (layer.norm_place != "pre" && layer.norm_place != "post")
        usage(at + " must be \"pre\" or \"post\", got " + toml_value(item));
    } else if (key == "repeat") {
      if (!item.is_number_integer() || item.get<int64_t>() < 1 || item.get<int64_t>() > 10000)
        usage(at + " must be a whole number from 1 to 10000, got " + toml_value(item));
      layer.repeat = item.get<int64_t>();
    } else {
      usage(where + ": unknown key \"" + key + "\"" +
            did_you_mean(key, keys_of({"mixer", "feed_forward", "feed_forward_options",
                                       "norm_place", "repeat"})));
    }
  }
  if (layer.feed_forward.empty() && !layer.feed_forward_options.empty())
    usage(where + ".feed_forward_options needs a feed_forward beside it");
  return layer;
}

// "a = 1, b = 2" of a table.
std::string inline_entries(const json& table) {
  std::string out;
  for (const auto& [key, value] : table.items())
    out += (out.empty() ? "" : ", ") + toml_key(key) + " = " + toml_value(value);
  return out;
}

std::string inline_mixer(const MixerChoice& mixer) {
  const std::string options = inline_entries(mixer.options);
  return "{ name = " + toml_string(mixer.name) + (options.empty() ? "" : ", " + options) + " }";
}

template <typename F>
void for_each_mixer(RunConfig& config, F&& f) {
  f(config.model.mixer);
  for (LayerPattern& layer : config.model.layers) f(layer.mixer);
}

std::string range_text(const ConfigField& field) {
  const auto bound = [](double x) {
    if (x == std::floor(x) && std::abs(x) < 1e15) return std::to_string(static_cast<int64_t>(x));
    return toml_number(x);
  };
  if (field.min == kTiny && field.max == kAny) return "above 0";
  if (field.min == kTiny) return "above 0 and at most " + bound(field.max);
  if (field.max == kAny) return "at least " + bound(field.min);
  return "from " + bound(field.min) + " to " + bound(field.max);
}

void check_range(const ConfigField& field, double value, const std::string& where,
                 const std::string& text) {
  if (field.min <= field.max && !(value >= field.min && value <= field.max && std::isfinite(value)))
    usage(where + " must be " + range_text(field) + ", got " + text);
}

}  // namespace

std::string ConfigField::env() const {
  std::string name = "GDN_";
  for (const char c : flag)
    name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

std::string ConfigField::text() const {
  return std::visit(
      [](const auto* p) -> std::string {
        using T = std::remove_cvref_t<decltype(*p)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return toml_string(*p);
        } else if constexpr (std::is_same_v<T, double>) {
          return toml_number(*p);
        } else if constexpr (std::is_same_v<T, bool>) {
          return *p ? "true" : "false";
        } else {
          return std::to_string(*p);
        }
      },
      value);
}

void ConfigField::set_json(const json& item, const std::string& where) const {
  if (bool* const* p = std::get_if<bool*>(&value)) {
    if (!item.is_boolean()) usage(where + " must be true or false, got " + toml_value(item));
    **p = item.get<bool>();
  } else if (std::string* const* p = std::get_if<std::string*>(&value)) {
    const std::string text = expect_string(item, where);
    if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
      std::string known;
      for (const std::string& choice : choices) known += (known.empty() ? "" : ", ") + choice;
      usage(where + " must be one of " + known + ", got \"" + text + "\"" +
            did_you_mean(text, choices));
    }
    **p = text;
  } else {
    if (!item.is_number()) usage(where + " must be a number, got " + toml_value(item));
    const double number = item.get<double>();
    check_range(*this, number, where, toml_value(item));
    if (double* const* p = std::get_if<double*>(&value)) {
      **p = number;
    } else {
      // 1e4 is a usual way to write a count.
      if (number != std::floor(number) || std::abs(number) > 9e15)
        usage(where + " must be a whole number, got " + toml_value(item));
      *std::get<int64_t*>(value) =
          item.is_number_integer() ? item.get<int64_t>() : static_cast<int64_t>(number);
    }
  }
}

void ConfigField::set_text(const std::string& text, const std::string& where) const {
  if (std::holds_alternative<std::string*>(value)) return set_json(text, where);
  if (is_bool()) {
    std::string word = text;
    for (char& c : word) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    for (const char* yes : {"true", "1", "yes", "on"})
      if (word == yes) return set_json(true, where);
    for (const char* no : {"false", "0", "no", "off"})
      if (word == no) return set_json(false, where);
    usage(where + " must be true or false, got \"" + text + "\"");
  }
  int64_t whole = 0;
  const char* const end = text.data() + text.size();
  if (const auto r = std::from_chars(text.data(), end, whole);
      r.ec == std::errc() && r.ptr == end && !text.empty())
    return set_json(whole, where);
  double number = 0;
  if (const auto r = std::from_chars(text.data(), end, number);
      r.ec == std::errc() && r.ptr == end && !text.empty())
    return set_json(number, where);
  usage(where + " must be a number, got \"" + text + "\"");
}

std::vector<ConfigField> config_fields(RunConfig& config) {
  RunConfig::Model& m = config.model;
  RunConfig::Data& d = config.data;
  RunConfig::Train& t = config.train;
  std::vector<ConfigField> fields;
  const auto add = [&](const char* section, const char* key, auto* value, const char* help,
                       double min = 1, double max = 0, const char* flag = nullptr) -> ConfigField& {
    std::string name = flag ? flag : key;
    std::replace(name.begin(), name.end(), '_', '-');
    return fields.emplace_back(ConfigField{section, key, name, value, help, {}, min, max});
  };
  const double kBig = 1 << 30;

  add("model", "hidden_size", &m.hidden_size, "width D of the model", 1, kBig);
  add("model", "num_layers", &m.num_layers, "number of blocks", 1, 4096);
  add("model", "feed_forward", &m.feed_forward,
      "feed-forward of every block: swiglu, moe, rwkv_channel_mix or none");
  add("model", "intermediate_size", &m.intermediate_size,
      "inner width of the feed-forward; 0: from hidden_ratio, rounded up to a multiple of 256", 0,
      kBig);
  add("model", "hidden_ratio", &m.hidden_ratio,
      "inner width as a multiple of hidden_size, before SwiGLU's 2/3", 1, 64);
  add("model", "norm_place", &m.norm_place, "norms before each sublayer or on its output")
      .choices = {"pre", "post"};
  add("model", "norm_eps", &m.norm_eps, "epsilon of the RMS norms", kTiny, 1);
  add("model", "residual_scale", &m.residual_scale, "factor on what each sublayer adds", kTiny,
      1e6);
  add("model", "initializer_range", &m.initializer_range, "standard deviation of initial weights",
      kTiny, 100);
  add("model", "tie_word_embeddings", &m.tie_word_embeddings,
      "the head uses the embedding's weights");
  add("model", "vocab_size", &m.vocab_size, "rows of the embedding; 0: the tokenizer's vocabulary",
      0, kBig);
  add("model", "max_position_embeddings", &m.max_position_embeddings,
      "longest sequence written into config.json", 1, kBig);

  add("data", "kind", &d.kind, "text: a file; stories: the generated corpus of the demo", 1, 0,
      "data-kind")
      .choices = {"text", "stories"};
  add("data", "path", &d.path, "UTF-8 text file to train on", 1, 0, "data");
  add("data", "tokenizer", &d.tokenizer, "tokens are bytes, or words of a list made from the text")
      .choices = {"byte", "word"};
  add("data", "max_words", &d.max_words, "longest list of the word tokenizer", 3, 1e7);
  add("data", "val_fraction", &d.val_fraction, "part of the text, at its end, kept for validation",
      0, 0.9);
  add("data", "pack_documents", &d.pack_documents,
      "cut the text at blank lines; documents do not see each other");
  add("data", "val_stories", &d.val_stories, "held-out stories", 1, 1e6);
  add("data", "text_fraction", &d.text_fraction,
      "of stories: how many of the tokens that are no answers are scored", 0, 1);
  add("data", "seq_len", &d.seq_len, "tokens per sequence, T", 1, kBig);
  add("data", "batch_size", &d.batch_size, "sequences per forward pass, B", 1, 1 << 20);
  add("data", "cache_dir", &d.cache_dir, "where token shards are kept; empty: ~/.cache/gdn");

  add("train", "out_dir", &t.out_dir, "folder of the run");
  add("train", "max_iters", &t.max_iters, "optimizer steps", 0, 1e12);
  add("train", "max_seconds", &t.max_seconds,
      "end after this time of training, the learning rate following the clock; 0: no limit", 0,
      1e9);
  add("train", "lr", &t.lr, "highest learning rate", 0, 1e30);
  add("train", "min_lr", &t.min_lr, "learning rate at the end of the cosine", 0, 1e30);
  add("train", "warmup_iters", &t.warmup_iters, "steps of linear warm-up", 0, 1e12);
  add("train", "weight_decay", &t.weight_decay, "of weights with two or more dimensions", 0, 1e6);
  add("train", "beta1", &t.beta1, "AdamW's decay of the mean gradient", 0, 0.999999999);
  add("train", "beta2", &t.beta2, "AdamW's decay of the mean squared gradient", 0, 0.999999999);
  add("train", "eps", &t.eps, "AdamW's epsilon", kTiny, 1);
  add("train", "grad_clip", &t.grad_clip, "largest global gradient norm; 0: no clipping", 0, 1e30);
  add("train", "grad_accum", &t.grad_accum, "forward and backward passes per step", 1, 1 << 20);
  add("train", "dtype", &t.dtype,
      "what layers compute in (weights and optimizer stay fp32); auto: bf16 where this machine "
      "multiplies it at least 1.3x as fast")
      .choices = {"fp32", "bf16", "auto"};
  add("train", "gradient_checkpointing", &t.gradient_checkpointing,
      "recompute each block in backward: less memory, more time");
  add("train", "seed", &t.seed, "of weights, data order and generated corpora", 0, 9e15);
  add("train", "threads", &t.threads, "CPU threads; 0: OMP_NUM_THREADS or all", 0, 4096);
  add("train", "eval_interval", &t.eval_interval,
      "steps between validations; 0: only at the start and end", 0, 1e12);
  add("train", "eval_iters", &t.eval_iters, "batches per validation; 0: the whole validation part",
      0, 1e12);
  add("train", "final_eval_iters", &t.final_eval_iters,
      "batches of the closing validation; 0: the whole validation part", 0, 1e12);
  add("train", "log_interval", &t.log_interval, "steps between progress lines", 1, 1e12);
  add("train", "save_interval", &t.save_interval, "steps between checkpoints; 0: only at the end",
      0, 1e12);
  add("train", "keep_checkpoints", &t.keep_checkpoints, "newest checkpoints to keep; 0: all", 0,
      1e9);
  add("train", "tensorboard", &t.tensorboard, "write TensorBoard event files");
  add("train", "init_from", &t.init_from,
      "scratch, resume, or the folder of a model whose weights to start from");
  add("train", "overfit_one_batch", &t.overfit_one_batch,
      "train on the first batch again and again (a check)");
  add("train", "dry_run", &t.dry_run,
      "print shapes, parameters, memory and tokens per step, then end");
  return fields;
}

RunConfig parse_run_config(std::string_view text, const std::string& name, RunConfig config) {
  toml::table root;
  try {
    root = toml::parse(text, name);
  } catch (const toml::parse_error& e) {
    std::ostringstream message;
    message << name << ":" << e.source().begin.line << ": not TOML: " << e.description();
    usage(message.str());
  }
  const json document = to_json(root, name + ": ");
  const std::vector<ConfigField> fields = config_fields(config);
  std::vector<std::pair<std::string, json>> layer_lists;
  for (const auto& [section, table] : document.items()) {
    if (section != "model" && section != "data" && section != "train") {
      std::string hint = did_you_mean(section, keys_of({"model", "data", "train"}));
      for (const ConfigField& field : fields)
        if (field.key == section)
          hint = " (\"" + section + "\" belongs into [" + field.section + "])";
      usage(name + ": unknown key \"" + section + "\"" + hint);
    }
    expect_table(table, name + ": [" + section + "]");
    for (const auto& [key, value] : table.items()) {
      const std::string where = name + ": " + section + "." + key;
      const auto field = std::find_if(fields.begin(), fields.end(),
                                      [&section = section, &key = key](const ConfigField& f) {
                                        return f.section == section && f.key == key;
                                      });
      if (field != fields.end()) {
        field->set_json(value, where);
      } else if (section == "model" && key == "mixer") {
        config.model.mixer = parse_mixer(value, where);
      } else if (section == "model" && key == "feed_forward_options") {
        config.model.feed_forward_options = expect_table(value, where);
      } else if (section == "model" && key == "layers") {
        layer_lists.emplace_back(where, value);  // after [model.mixer], which entries may lean on
      } else {
        std::vector<std::string> known;
        std::string hint;
        for (const ConfigField& f : fields) {
          if (f.section == section) known.push_back(f.key);
          if (f.section != section && f.key == key) hint = " (it belongs into [" + f.section + "])";
        }
        if (section == "model")
          known.insert(known.end(), {"mixer", "layers", "feed_forward_options"});
        usage(name + ": unknown key \"" + key + "\" in [" + section + "]" +
              (hint.empty() ? did_you_mean(key, known) : hint));
      }
    }
  }
  for (const auto& [where, list] : layer_lists) {
    if (!list.is_array())
      usage(where + " must be a list of tables ([[model.layers]]), got " + kind_of(list));
    config.model.layers.clear();
    for (const json& entry : list)
      config.model.layers.push_back(parse_layer(entry, where, config.model));
  }
  return config;
}

RunConfig load_run_config(const std::string& path, RunConfig base) {
  std::string text;
  try {
    text = read_text_file(path);
  } catch (const Error& e) {
    throw UsageError(e.what());
  }
  return parse_run_config(text, path, std::move(base));
}

void apply_environment(RunConfig& config) {
  for (const ConfigField& field : config_fields(config))
    if (const char* value = std::getenv(field.env().c_str())) field.set_text(value, field.env());
}

std::string to_toml(const RunConfig& config) {
  RunConfig copy = config;
  std::string out, section;
  const auto finish_model = [&] {
    if (section != "model") return;
    out += "\n[model.mixer]\nname = " + toml_string(copy.model.mixer.name) + "\n";
    for (const auto& [key, value] : copy.model.mixer.options.items())
      out += toml_key(key) + " = " + toml_value(value) + "\n";
    if (!copy.model.feed_forward_options.empty()) {
      out += "\n[model.feed_forward_options]\n";
      for (const auto& [key, value] : copy.model.feed_forward_options.items())
        out += toml_key(key) + " = " + toml_value(value) + "\n";
    }
    for (const LayerPattern& layer : copy.model.layers) {
      out += "\n[[model.layers]]\nmixer = " + inline_mixer(layer.mixer) + "\n";
      if (!layer.feed_forward.empty())
        out += "feed_forward = " + toml_string(layer.feed_forward) + "\n";
      if (!layer.feed_forward_options.empty())
        out += "feed_forward_options = { " + inline_entries(layer.feed_forward_options) + " }\n";
      if (!layer.norm_place.empty()) out += "norm_place = " + toml_string(layer.norm_place) + "\n";
      out += "repeat = " + std::to_string(layer.repeat) + "\n";
    }
  };
  for (const ConfigField& field : config_fields(copy)) {
    if (field.section != section) {
      finish_model();
      section = field.section;
      out += (out.empty() ? "[" : "\n[") + section + "]\n";
    }
    out += field.key + " = " + field.text() + "\n";
  }
  return out;
}

void replace_mixer(RunConfig& config, const std::string& name,
                   const std::vector<std::string>& known_options) {
  for_each_mixer(config, [&](MixerChoice& mixer) {
    if (mixer.name == "none") return;
    mixer.name = name;
    json kept = json::object();
    for (const auto& [key, value] : mixer.options.items())
      if (std::find(known_options.begin(), known_options.end(), key) != known_options.end())
        kept[key] = value;
    mixer.options = std::move(kept);
  });
}

void set_mixer_option(RunConfig& config, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    usage("--mixer-option must be OPTION=VALUE or MIXER.OPTION=VALUE, got \"" + assignment + "\"");
  std::string key = assignment.substr(0, equals), mixer_name;
  if (const size_t dot = key.find('.'); dot != std::string::npos) {
    mixer_name = key.substr(0, dot);
    key = key.substr(dot + 1);
  }
  const std::string text = assignment.substr(equals + 1);
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) value = text;  // a bare word is a string
  bool found = mixer_name.empty();
  for_each_mixer(config, [&](MixerChoice& mixer) {
    if (mixer.name == "none" || (!mixer_name.empty() && mixer.name != mixer_name)) return;
    mixer.options[key] = value;
    found = true;
  });
  if (!found)
    usage("--mixer-option " + assignment + ": no layer uses the mixer \"" + mixer_name + "\"");
}

void validate(const RunConfig& config) {
  const auto& [m, d, t] = config;
  if (d.kind == "text" && d.path.empty())
    usage(
        "data.path is empty: name a UTF-8 text file with --data FILE, or use --data-kind stories");
  if (t.out_dir.empty()) usage("train.out_dir is empty: name the run's folder with --out-dir");
  if (t.min_lr > t.lr)
    usage(str_cat("train.min_lr must not be above train.lr (", toml_number(t.lr), "), got ",
                  toml_number(t.min_lr)));
}

ModelConfig make_model_config(const RunConfig& config, int64_t tokenizer_vocab, int64_t eos_id) {
  const RunConfig::Model& m = config.model;
  ModelConfig out;
  if (m.vocab_size != 0 && m.vocab_size < tokenizer_vocab)
    usage(str_cat("model.vocab_size must be 0 or at least the tokenizer's ", tokenizer_vocab,
                  ", got ", m.vocab_size));
  out.vocab_size = m.vocab_size ? m.vocab_size : tokenizer_vocab;
  out.hidden_size = m.hidden_size;
  out.hidden_ratio = m.hidden_ratio;
  if (m.intermediate_size != 0) out.intermediate_size = m.intermediate_size;
  out.norm_eps = m.norm_eps;
  out.initializer_range = m.initializer_range;
  out.tie_word_embeddings = m.tie_word_embeddings;
  out.max_position_embeddings = m.max_position_embeddings;
  if (eos_id >= 0) out.eos_token_id = eos_id;

  std::vector<LayerPattern> pattern = m.layers;
  if (pattern.empty()) pattern.push_back({m.mixer, "", "", 1});
  const auto given = [](const std::string& own, const std::string& common) {
    const std::string& name = own.empty() ? common : own;
    return name == "none" ? std::string() : name;
  };
  while (static_cast<int64_t>(out.blocks.size()) < m.num_layers) {
    for (const LayerPattern& layer : pattern) {
      BlockConfig block;
      block.mixer = given(layer.mixer.name, "");
      if (!block.mixer.empty()) block.mixer_options = layer.mixer.options;
      block.feed_forward = given(layer.feed_forward, m.feed_forward);
      block.feed_forward_options =
          layer.feed_forward.empty() ? m.feed_forward_options : layer.feed_forward_options;
      block.norm_place =
          given(layer.norm_place, m.norm_place) == "post" ? NormPlace::kPost : NormPlace::kPre;
      block.residual_scale = m.residual_scale;
      for (int64_t i = 0;
           i < layer.repeat && static_cast<int64_t>(out.blocks.size()) < m.num_layers; ++i)
        out.blocks.push_back(block);
    }
  }
  return out;
}

}  // namespace gdn
