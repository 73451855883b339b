// SPDX-License-Identifier: Apache-2.0
// The frame of the program `gdn`. One file per command defines add_<command>_command, which adds
// the subcommand with its flags and sets `run` when the user chose it. Results go to stdout,
// everything else to stderr.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace gdn {

// Throw it when Ctrl-C ended the work: the program exits with status 130.
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What the chosen command does once all flags are read; returns the exit status.
using Run = std::function<int()>;

void add_bench_command(CLI::App& app, Run& run);
void add_demo_command(CLI::App& app, Run& run);
void add_eval_command(CLI::App& app, Run& run);
void add_generate_command(CLI::App& app, Run& run);
void add_info_command(CLI::App& app, Run& run);
void add_mixers_command(CLI::App& app, Run& run);
void add_plot_command(CLI::App& app, Run& run);
void add_train_command(CLI::App& app, Run& run);

// The whole program. 0: done, 1: failed, 2: wrong usage, 130: interrupted. Never throws.
int run_main(int argc, char** argv);

// "0.1.0, commit 1a2b3c4, torch 2.13.0, CPU only".
std::string version();

}  // namespace gdn
