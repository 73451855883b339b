// SPDX-License-Identifier: Apache-2.0
// gdn mixers: what the registry holds.
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <CLI/CLI.hpp>
#include <iomanip>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/cli/cli.h"
#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

constexpr int64_t kWidth = 256;  // of the layer whose state is measured
constexpr int64_t kTokens = 512;

struct StateSize {
  int64_t bytes;         // of one sequence and layer, before the first token
  int64_t bytes_filled;  // after kTokens
};

StateSize measure_state(const MixerInfo& info) {
  const c10::InferenceMode inference;
  MixerArgs args;
  args.hidden_size = kWidth;
  const auto mixer = make_mixer(info.name, args);
  State state = mixer->zero_state(1, at::kFloat);
  const int64_t empty = state.bytes();
  Context ctx;
  ctx.state = &state;
  Shared shared;
  ctx.shared = &shared;
  mixer->forward(at::zeros({1, kTokens, kWidth}), ctx);
  return {empty, state.bytes()};
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

void print_json() {
  nlohmann::json list = nlohmann::json::array();
  for (const MixerInfo& info : mixers()) {
    nlohmann::json options = nlohmann::json::array();
    for (const MixerOption& option : info.options) {
      options.push_back(
          {{"name", option.name}, {"default", option.default_value}, {"help", option.help}});
    }
    const StateSize state = measure_state(info);
    list.push_back({{"name", info.name},
                    {"title", info.title},
                    {"paper", info.paper},
                    {"forms", info.forms},
                    {"devices", info.devices},
                    {"options", options},
                    {"state",
                     {{"hidden_size", kWidth},
                      {"bytes", state.bytes},
                      {"bytes_after_512_tokens", state.bytes_filled}}}});
  }
  std::cout << list.dump(2) << "\n";
}

void print_table() {
  const auto row = [](const std::string& name, const std::string& forms, const std::string& devices,
                      const std::string& state, const std::string& paper) {
    std::cout << std::left << std::setw(24) << name << std::setw(30) << forms << std::setw(9)
              << devices << std::right << std::setw(12) << state << "  " << std::left << paper
              << "\n";
  };
  row("MIXER", "FORMS", "DEVICES", "STATE", "PAPER");
  bool grows = false;
  for (const MixerInfo& info : mixers()) {
    const StateSize state = measure_state(info);
    const bool growing = state.bytes_filled > state.bytes;
    grows |= growing;
    const int64_t kib = (state.bytes_filled + 1023) / 1024;
    row(info.name, joined(info.forms), joined(info.devices),
        std::to_string(kib) + " KiB" + (growing ? "*" : " "), info.title + ", " + info.paper);
  }
  std::cout << "STATE: of one sequence in one layer of width " << kWidth
            << " with default options, in fp32"
            << (grows ? "; *: grows with the tokens, here after " + std::to_string(kTokens) : "")
            << ".\n";
}

}  // namespace

void add_mixers_command(CLI::App& app, Run& run) {
  auto json = std::make_shared<bool>(false);
  CLI::App* command =
      app.add_subcommand("mixers", "List the sequence mixers that configurations can name");
  command->add_flag("--json", *json,
                    "Print a list of JSON objects, with every option of every mixer");
  command->callback([json, &run] {
    run = [json] {
      *json ? print_json() : print_table();
      return 0;
    };
  });
}

}  // namespace gdn
