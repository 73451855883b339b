// SPDX-License-Identifier: Apache-2.0
// gdn info: what this build and this machine can do, or what a model is made of.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <hwy/targets.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/base/parallel.h"
#include "gdn/cli/build_info.h"
#include "gdn/cli/cli.h"
#include "gdn/kernels/simd/pairs.h"
#include "gdn/kernels/simd/targets.h"
#include "gdn/mixers/mixer.h"
#include "gdn/model/checkpoint.h"
#include "gdn/model/safetensors.h"

namespace gdn {
namespace {

struct InfoOptions {
  std::string model;  // "": the build
  bool json = false;
};

// The vector instruction sets that this CPU runs, best first.
std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  int64_t targets = hwy::SupportedTargets();
  const int64_t portable = HWY_EMU128 | HWY_SCALAR;  // of interest only where there is nothing else
  if (targets & ~portable) targets &= ~portable;
  for (int64_t bit = 1; bit > 0; bit <<= 1) {
    if (targets & bit) names.push_back(hwy::TargetName(bit));
  }
  return names;
}

nlohmann::json build_info() {
  nlohmann::json info = {{"version", GDN_VERSION},          {"commit", GDN_GIT_HASH},
                         {"compiler", GDN_COMPILER},        {"build_type", GDN_BUILD_TYPE},
                         {"torch", TORCH_VERSION},          {"cuda", at::hasCUDA()},
                         {"simd_targets", simd_targets()},  {"simd_target", simd_target()},
                         {"bf16_products", pair_backend()}, {"threads", num_threads()}};
  info["cuda_devices"] = at::hasCUDA() ? at::detail::getCUDAHooks().deviceCount() : 0;
  return info;
}

std::string joined(const nlohmann::json& list) {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : ", ") + item.get<std::string>();
  return text;
}

int info_on_build(bool json) {
  const nlohmann::json info = build_info();
  if (json) {
    std::cout << info.dump(2) << "\n";
    return 0;
  }
  const auto line = [](const char* name, const auto& value) {
    std::cout << std::left << std::setw(14) << name << value << "\n";
  };
  line("gdn", std::string(GDN_VERSION) + " (commit " GDN_GIT_HASH ")");
  line("build", std::string(GDN_BUILD_TYPE) + ", " + GDN_COMPILER);
  line("torch", TORCH_VERSION);
  line("CUDA", info["cuda_devices"] == 0 ? std::string("none")
                                         : info["cuda_devices"].dump() + " device(s)");
  line("SIMD targets", joined(info["simd_targets"]));
  line("SIMD used", std::string(simd_target()) + " (limit it by GDN_SIMD)");
  line("bf16 products", std::string(pair_backend()) + " (choose by GDN_BF16)");
  line("threads", num_threads());
  return 0;
}

// The part of the model that a parameter belongs to, by fla's names.
std::string part_of(const std::string& name, const ModelConfig& config) {
  if (name.starts_with("model.embeddings.")) return "embeddings";
  if (name.starts_with("lm_head.")) return "lm_head";
  if (name.find(".attn.") == std::string::npos) {
    return name.find(".mlp.") == std::string::npos ? "norms" : "feed_forward";
  }
  const std::string prefix = "model.layers.";
  const size_t layer = std::strtoul(name.c_str() + prefix.size(), nullptr, 10);
  return layer < config.blocks.size() ? config.blocks[layer].mixer : "mixer";
}

// Reads the headers of the weights only, and makes one layer at a time to ask for its state.
nlohmann::json model_info(const std::string& folder) {
  const ModelConfig config = load_model_config(folder);
  nlohmann::json parts = nlohmann::json::object();
  int64_t total = 0, file_bytes = 0;
  const SafetensorsReader reader(folder);
  for (const FileTensor& tensor : reader.tensors()) {
    const int64_t count = static_cast<int64_t>(tensor.bytes) / size_of(tensor.dtype);
    const std::string part = part_of(tensor.name, config);
    parts[part] = parts.value(part, int64_t{0}) + count;
    total += count;
    file_bytes += static_cast<int64_t>(tensor.bytes);
  }
  std::map<std::string, int64_t> state_of;  // by mixer and options
  int64_t state_bytes = 0;
  for (size_t i = 0; i < config.blocks.size(); ++i) {
    const BlockConfig& block = config.blocks[i];
    if (block.mixer.empty()) continue;
    const auto [entry, added] = state_of.emplace(block.mixer + block.mixer_options.dump(), 0);
    if (added) {
      MixerArgs args;
      args.hidden_size = config.hidden_size;
      args.layer_idx = static_cast<int64_t>(i);
      args.num_layers = static_cast<int64_t>(config.blocks.size());
      args.norm_eps = config.norm_eps;
      args.options = block.mixer_options;
      entry->second = make_mixer(block.mixer, std::move(args))->zero_state(1, at::kFloat).bytes();
    }
    state_bytes += entry->second;
  }
  return {{"model", folder},
          {"parameters", total},
          {"parameters_by_part", parts},
          {"weight_bytes", file_bytes},
          {"state_bytes_per_sequence", state_bytes},
          {"config", to_json(config)}};
}

int info_on_model(const std::string& folder, bool json) {
  const nlohmann::json info = model_info(folder);
  if (json) {
    std::cout << info.dump(2) << "\n";
    return 0;
  }
  const auto line = [](const std::string& name, int64_t value, const std::string& note = "") {
    std::cout << std::left << std::setw(28) << name << std::right << std::setw(14) << value << note
              << "\n";
  };
  const int64_t total = info["parameters"].get<int64_t>();
  line("parameters", total);
  for (const auto& [part, count] : info["parameters_by_part"].items()) {
    const double percent =
        100.0 * count.get<double>() / static_cast<double>(std::max<int64_t>(total, 1));
    line("  " + part, count.get<int64_t>(), "  (" + std::to_string(std::lround(percent)) + " %)");
  }
  line("bytes of weights", info["weight_bytes"].get<int64_t>());
  line("state bytes per sequence", info["state_bytes_per_sequence"].get<int64_t>(),
       "  (fp32, before the first token)");
  std::cout << "\n" << info["config"].dump(2) << "\n";
  return 0;
}

}  // namespace

std::string version() {
  return "gdn " GDN_VERSION " (commit " GDN_GIT_HASH "), torch " TORCH_VERSION +
         std::string(at::hasCUDA() ? ", CUDA" : ", CPU only") + ", SIMD " +
         joined(nlohmann::json(simd_targets()));
}

void add_info_command(CLI::App& app, Run& run) {
  auto options = std::make_shared<InfoOptions>();
  CLI::App* command = app.add_subcommand("info", "Show the build and this machine, or a model");
  command->add_option("model", options->model,
                      "Folder of a model: show its parameters, state and configuration");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([options, &run] {
    run = [options] {
      return options->model.empty() ? info_on_build(options->json)
                                    : info_on_model(options->model, options->json);
    };
  });
}

}  // namespace gdn
