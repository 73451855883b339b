// SPDX-License-Identifier: Apache-2.0
// gdn train: defaults < --config < GDN_* variables < flags.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/cli/cli.h"
#include "gdn/mixers/mixer.h"
#include "gdn/train/allocator.h"
#include "gdn/train/config.h"
#include "gdn/train/trainer.h"

namespace gdn {
namespace {

struct TrainFlags {
  std::string config;
  std::string mixer;
  std::vector<std::string> mixer_options;
  bool resume = false, json = false, quiet = false;
  std::map<std::string, std::string>
      given;  // by flag name, as typed; filled for flags that were used
  std::map<std::string, CLI::Option*> options;
};

std::string group_of(const std::string& section) {
  return section == "model" ? "Model" : section == "data" ? "Data" : "Training";
}

const char* value_name(const ConfigField& field) {
  if (std::holds_alternative<int64_t*>(field.value)) return "N";
  if (std::holds_alternative<double*>(field.value)) return "X";
  return "TEXT";
}

// Which folder the run is in, known before the rest of the configuration because --resume reads
// config.toml from it.
std::string given_out_dir(const TrainFlags& flags) {
  if (flags.options.at("out-dir")->count() > 0) return flags.given.at("out-dir");
  const char* variable = std::getenv("GDN_OUT_DIR");
  return variable != nullptr ? variable : RunConfig().train.out_dir;
}

RunConfig resolve(TrainFlags& flags) {
  RunConfig config;
  const std::string saved = given_out_dir(flags) + "/config.toml";
  const auto init = flags.options.at("init-from");
  if (init->count() > 0 && flags.given.at("init-from") == "resume") flags.resume = true;
  if (!flags.config.empty()) {
    config = load_run_config(flags.config);
  } else if (flags.resume && std::filesystem::exists(saved)) {
    config = load_run_config(saved);
  }
  apply_environment(config);
  const char* mixer_variable = std::getenv("GDN_MIXER");
  const std::string mixer = !flags.mixer.empty() ? flags.mixer
                            : mixer_variable     ? mixer_variable
                                                 : "";
  if (!mixer.empty()) {
    std::vector<std::string> known;
    for (const MixerOption& option : find_mixer(mixer).options) known.push_back(option.name);
    replace_mixer(config, mixer, known);
  }
  for (const std::string& option : flags.mixer_options) set_mixer_option(config, option);
  for (const ConfigField& field : config_fields(config))
    if (flags.options.at(field.flag)->count() > 0)
      field.set_text(flags.given.at(field.flag), "--" + field.flag);
  // The saved configuration says how the run began, so that reading it again does not resume by
  // surprise.
  if (config.train.init_from == "resume") {
    flags.resume = true;
    config.train.init_from = "scratch";
  }
  return config;
}

int run_train(TrainFlags& flags) {
  const RunConfig config = resolve(flags);
  keep_freed_memory();
  if (config.train.dry_run) {
    dry_run(config, std::cout);
    return 0;
  }
  std::ostream silent(nullptr);
  const TrainResult r = train(config, flags.resume, flags.quiet ? silent : std::cerr);
  if (flags.json) {
    nlohmann::ordered_json out = {{"step", r.step}};
    if (r.loss) out["loss"] = *r.loss;
    if (r.val_loss) out["val_loss"] = *r.val_loss;
    out["seconds"] = r.seconds;
    out["parameters"] = r.parameters;
    out["checkpoint"] = r.checkpoint;
    std::cout << out.dump() << "\n";
  } else {
    std::cout << "step        " << r.step << "\n";
    if (r.loss) std::cout << "loss        " << *r.loss << " nats per token\n";
    if (r.val_loss) std::cout << "val loss    " << *r.val_loss << " nats per token\n";
    std::cout << "seconds     " << r.seconds << "\n"
              << "parameters  " << r.parameters << "\n"
              << "checkpoint  " << r.checkpoint << "\n";
  }
  if (r.stopped_by == 0) return 0;
  std::cerr << "stopped by " << (r.stopped_by == SIGINT ? "Ctrl-C" : "SIGTERM") << " after step "
            << r.step << "; --resume goes on from " << r.checkpoint << "\n";
  return 128 + r.stopped_by;  // 130 and 143, as shells name these ends
}

}  // namespace

void add_train_command(CLI::App& app, Run& run) {
  auto flags = std::make_shared<TrainFlags>();
  CLI::App* command = app.add_subcommand("train", "Train a language model, or go on with a run");
  command->add_option("-c,--config", flags->config, "TOML file of the run; flags override it")
      ->type_name("FILE")
      ->group("Run");
  command
      ->add_flag("--resume", flags->resume,
                 "Go on from the newest good checkpoint of --out-dir (without --config: as it was "
                 "configured)")
      ->group("Run");
  command->add_flag("--json", flags->json, "Print the result as one JSON object")->group("Run");
  command->add_flag("-q,--quiet", flags->quiet, "No progress on stderr")->group("Run");
  command
      ->add_option("--mixer", flags->mixer,
                   "Mixer of every layer; it keeps the options it knows [GDN_MIXER]")
      ->type_name("NAME")
      ->group("Model");
  command
      ->add_option("--mixer-option", flags->mixer_options,
                   "OPTION=VALUE of every mixer, or MIXER.OPTION=VALUE; may be given several times")
      ->type_name("OPTION=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->default_str("")
      ->group("Model");
  RunConfig defaults;
  for (const ConfigField& field : config_fields(defaults)) {
    std::string help = field.help + " [" + field.env() + "]";
    if (!field.choices.empty()) {
      help += ": ";
      for (const std::string& choice : field.choices)
        help += (choice == field.choices.front() ? "" : "|") + choice;
    }
    std::string& text = flags->given[field.flag];
    CLI::Option* option = nullptr;
    if (field.is_bool()) {
      option = command->add_flag("--" + field.flag, text, help);
    } else {
      option = command->add_option("--" + field.flag, text, help)->type_name(value_name(field));
    }
    const auto* words = std::get_if<std::string*>(&field.value);
    option->default_str(words ? **words : field.text())->group(group_of(field.section));
    flags->options[field.flag] = option;
  }
  command->footer(
      "Exit status: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM "
      "after saving.");
  command->callback([flags, &run] { run = [flags] { return run_train(*flags); }; });
}

}  // namespace gdn
