// SPDX-License-Identifier: Apache-2.0
// gdn plot: loss curves of runs as a PNG. Drawing is matplotlib's work: the script tools/plot.py is
// part of the program and runs in the Python environment that set-up made.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/cli/cli.h"
#include "gdn/cli/plot_script.h"

namespace gdn {
namespace {

struct PlotFlags {
  std::vector<std::string> runs;
  std::string output, x = "step";
};

std::string python() {
  if (const char* chosen = std::getenv("GDN_PYTHON"); chosen != nullptr && *chosen != '\0')
    return chosen;
  return std::filesystem::exists(kPlotPython) ? kPlotPython : "python3";
}

int run_plot(const PlotFlags& flags) {
  for (const std::string& run : flags.runs)
    GDN_CHECK(std::filesystem::is_regular_file(run + "/metrics.jsonl"), "[plot] ", run,
              " is not the folder of a run: it has no metrics.jsonl");
  const std::string interpreter = python();
  std::vector<std::string> args = {interpreter, "-c", kPlotScript, "--x", flags.x};
  if (!flags.output.empty()) args.insert(args.end(), {"--output", flags.output});
  args.insert(args.end(), flags.runs.begin(), flags.runs.end());
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  throw Error(str_cat("[plot] cannot start ", interpreter, ": ", std::strerror(errno),
                      "; set GDN_PYTHON to a Python that has matplotlib"));
}

}  // namespace

void add_plot_command(CLI::App& app, Run& run) {
  auto flags = std::make_shared<PlotFlags>();
  CLI::App* command = app.add_subcommand("plot", "Draw the loss curves of runs as a PNG");
  command->add_option("runs", flags->runs, "Folders of runs")->required()->type_name("RUN");
  command
      ->add_option("-o,--output", flags->output,
                   "The picture (default: RUN/loss.png of the first run)")
      ->type_name("FILE");
  command->add_option("--x", flags->x, "Horizontal axis")
      ->check(CLI::IsMember({"step", "seconds"}));
  command->callback([flags, &run] { run = [flags] { return run_plot(*flags); }; });
}

}  // namespace gdn
