// SPDX-License-Identifier: Apache-2.0
// What one training run is: model, data and training settings. One list of fields (config_fields)
// serves TOML files, GDN_* variables, flags, --help, printing and saving, so that they cannot drift
// apart. Torch-free.
//
// Order: defaults < TOML file < environment < flags.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "gdn/model/config.h"

namespace gdn {

// A mixer by name with the options given for it; the registry knows which names and options exist.
struct MixerChoice {
  std::string name = "gated_delta_net";
  nlohmann::json options = nlohmann::json::object();
  bool operator==(const MixerChoice&) const = default;
};

// One entry of [[model.layers]]: `repeat` equal blocks. The list as a whole repeats until there are
// num_layers blocks. What an entry leaves out is taken from [model]. A mixer or feed-forward "none"
// is left out of the block.
struct LayerPattern {
  MixerChoice mixer;
  std::string feed_forward;
  std::string norm_place;
  int64_t repeat = 1;
  nlohmann::json feed_forward_options = nlohmann::json::object();  // of its own feed_forward
  bool operator==(const LayerPattern&) const = default;
};

struct RunConfig {
  struct Model {
    int64_t hidden_size = 256;
    int64_t num_layers = 4;
    MixerChoice mixer;                 // of every layer when `layers` is empty
    std::vector<LayerPattern> layers;  // hybrids
    std::string feed_forward = "swiglu";
    nlohmann::json feed_forward_options = nlohmann::json::object();
    int64_t intermediate_size = 0;
    int64_t hidden_ratio = 4;
    std::string norm_place = "pre";
    double norm_eps = 1e-6;
    double residual_scale = 1.0;
    double initializer_range = 0.02;
    bool tie_word_embeddings = false;
    int64_t vocab_size = 0;
    int64_t max_position_embeddings = 2048;
    bool operator==(const Model&) const = default;
  } model;

  struct Data {
    std::string kind = "text";
    std::string path;
    std::string tokenizer = "byte";
    int64_t max_words = 8192;
    double val_fraction = 0.1;
    bool pack_documents = false;
    int64_t val_stories = 512;
    double text_fraction = 0.0625;
    int64_t seq_len = 256;
    int64_t batch_size = 32;
    std::string cache_dir;
    bool operator==(const Data&) const = default;
  } data;

  struct Train {
    std::string out_dir = "runs/default";
    int64_t max_iters = 1000;
    double max_seconds = 0;
    double lr = 1e-3;
    double min_lr = 1e-4;
    int64_t warmup_iters = 50;
    double weight_decay = 0.1;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double grad_clip = 1.0;
    int64_t grad_accum = 1;
    std::string dtype = "fp32";
    bool gradient_checkpointing = false;
    int64_t seed = 1337;
    int64_t threads = 0;
    int64_t eval_interval = 250;
    int64_t eval_iters = 0;
    int64_t final_eval_iters = 0;
    int64_t log_interval = 10;
    int64_t save_interval = 500;
    int64_t keep_checkpoints = 3;
    bool tensorboard = true;
    std::string init_from = "scratch";
    bool overfit_one_batch = false;
    bool dry_run = false;
    bool operator==(const Train&) const = default;
  } train;

  bool operator==(const RunConfig&) const = default;
};

// One setting: where it lives in TOML, what its flag is called, and where its value is.
struct ConfigField {
  std::string section;  // "model", "data", "train"
  std::string key;      // in TOML: "batch_size"
  std::string flag;     // without dashes: "batch-size"
  std::variant<int64_t*, double*, bool*, std::string*> value;
  std::string help;
  std::vector<std::string> choices;  // of a string; empty: any
  double min = 0, max = 0;           // of a number, inclusive; min > max: any

  std::string env() const;  // "GDN_BATCH_SIZE"
  bool is_bool() const { return std::holds_alternative<bool*>(value); }
  std::string text() const;  // the value as TOML
  // Parses and checks. `where` begins the message of the UsageError: "--lr", "GDN_LR".
  void set_text(const std::string& text, const std::string& where) const;
  void set_json(const nlohmann::json& value, const std::string& where) const;
};

// Every plain setting of `config`, in the order of --help. The fields point into `config`.
std::vector<ConfigField> config_fields(RunConfig& config);

// What the TOML `text` says, over `base`. `name` (the file) begins error messages. Unknown keys,
// wrong types and values out of range are UsageErrors that name file and key.
RunConfig parse_run_config(std::string_view text, const std::string& name, RunConfig base = {});
RunConfig load_run_config(const std::string& path, RunConfig base = {});

// Applies the variables GDN_<KEY> that are set.
void apply_environment(RunConfig& config);

// The whole configuration as TOML; parse_run_config gives it back.
std::string to_toml(const RunConfig& config);

// Puts mixer `name` into every layer that has one, keeping those of its old options that are in
// `known_options`.
void replace_mixer(RunConfig& config, const std::string& name,
                   const std::vector<std::string>& known_options);

// Sets one mixer option: "OPTION=VALUE" in every layer, "MIXER.OPTION=VALUE" in the layers of that
// mixer.
void set_mixer_option(RunConfig& config, const std::string& assignment);

// Rules across fields; throws UsageError.
void validate(const RunConfig& config);

// The model's blocks written out. vocab_size of the configuration (0: `tokenizer_vocab`) must hold
// the tokenizer's.
ModelConfig make_model_config(const RunConfig& config, int64_t tokenizer_vocab,
                              int64_t eos_id = -1);

}  // namespace gdn
