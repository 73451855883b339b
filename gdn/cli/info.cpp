// SPDX-License-Identifier: Apache-2.0
// gdn info: what this build and this machine can do.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <hwy/targets.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/base/parallel.h"
#include "gdn/cli/build_info.h"
#include "gdn/cli/cli.h"

namespace gdn {
namespace {

struct InfoOptions {
  std::string model;
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
  nlohmann::json info = {{"version", GDN_VERSION},         {"commit", GDN_GIT_HASH},
                         {"compiler", GDN_COMPILER},       {"build_type", GDN_BUILD_TYPE},
                         {"torch", TORCH_VERSION},         {"cuda", at::hasCUDA()},
                         {"simd_targets", simd_targets()}, {"threads", num_threads()}};
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
  line("threads", num_threads());
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
  CLI::App* command = app.add_subcommand("info", "Show the build and this machine");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([options, &run] { run = [options] { return info_on_build(options->json); }; });
}

}  // namespace gdn
