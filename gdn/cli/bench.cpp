// SPDX-License-Identifier: Apache-2.0
// gdn bench: how fast this build is on this machine, against what the machine allows.
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <map>
#include <memory>
#include <string>

#include "gdn/base/check.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/report.h"
#include "gdn/cli/cli.h"
#include "gdn/train/allocator.h"

namespace gdn {

void add_bench_command(CLI::App& app, Run& run) {
  struct Given {
    std::string what;
    bench::Options options;
  };
  auto given = std::make_shared<Given>();
  bench::Options& o = given->options;
  CLI::App* command =
      app.add_subcommand("bench", "Measure the speed of this build on this machine");
  command
      ->add_option("what", given->what,
                   "ceilings (of the machine), ops, mixers, train or decode (whole models)")
      ->required()
      ->check(CLI::IsMember({"ceilings", "ops", "mixers", "train", "decode"}));
  command->add_option("-t,--threads", o.threads, "Numbers of threads, each in turn; default: all")
      ->check(CLI::Range(1, 1024))
      ->type_name("N ...");
  command
      ->add_option("--seconds", o.seconds,
                   "About how many seconds of measuring for each row of ops and mixers, a quarter "
                   "of those for a "
                   "row of train")
      ->check(CLI::Range(0.001, 1000.0))
      ->capture_default_str();
  command->add_option("--filter", o.filter,
                      "Only rows whose name, as it is printed, contains this");
  command->add_option("--dtype", o.dtype, "fp32, bf16 or all (ops, train, decode)")
      ->check(CLI::IsMember({"fp32", "bf16", "all"}))
      ->capture_default_str();
  command->add_option("-c,--config", o.config,
                      "TOML file of a run: the model and batch of train and decode; default: 3.96 "
                      "M parameters, 4 layers of width 256");
  command
      ->add_option("--mixer", o.mixer,
                   "train, decode: this mixer in place of the model's, with the options it shares")
      ->type_name("NAME");
  command->add_option("-n,--tokens", o.tokens, "decode: how many tokens")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  command
      ->add_option("--interval", o.interval,
                   "decode: tokens per line of time and memory; 0: an eighth of --tokens if "
                   "these are more than 1024, else no such lines")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--hidden-size", o.hidden_size, "mixers: width of the layer")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command->add_flag("--json", o.json, "Print one JSON object instead of a table");
  command->add_option("-o,--out", o.out, "Write the JSON object to this file, too")
      ->type_name("FILE");
  command->callback([given, &run] {
    run = [given] {
      bench::Options& options = given->options;
      if (options.threads.empty()) options.threads = {at::get_num_threads()};
      options.version = version();
      keep_freed_memory();
      static const std::map<std::string, int (*)(const bench::Options&)> commands = {
          {"ceilings", &bench::run_ceilings},
          {"ops", &bench::run_ops},
          {"mixers", &bench::run_mixers},
          {"train", &bench::run_train},
          {"decode", &bench::run_decode}};
      return commands.at(given->what)(options);
    };
  });
}

}  // namespace gdn
