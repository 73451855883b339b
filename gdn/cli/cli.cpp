// SPDX-License-Identifier: Apache-2.0
#include "gdn/cli/cli.h"

#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/names.h"

namespace gdn {
namespace {

bool debugging() {
  const char* value = std::getenv("GDN_DEBUG");
  return value != nullptr && std::string_view(value) == "1";
}

int report(const std::string& what, int status, const std::string& hint = "") {
  const std::string line = debugging() ? what : what.substr(0, what.find('\n'));
  std::cout.flush();
  std::fprintf(stderr, "gdn: error: %s\n", line.c_str());
  if (!hint.empty()) std::fprintf(stderr, "gdn: hint: %s\n", hint.c_str());
  return status;
}

std::vector<std::string> long_flags(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

CLI::App* find_command(const CLI::App& app, const std::string& name) {
  std::vector<std::string> names;
  for (CLI::App* command : const_cast<CLI::App&>(app).get_subcommands({})) {
    if (command->get_name() == name) return command;
    names.push_back(command->get_name());
  }
  throw UsageError(str_cat("unknown command \"", name, "\"", did_you_mean(name, names)));
}

// Writes --max_new_tokens as --max-new-tokens, and rejects unknown commands and flags with the
// nearest known name before the parser can complain about what else is missing. `command` becomes
// the subcommand that was named, if any.
void normalize(CLI::App& app, std::vector<std::string>& args, CLI::App*& command) {
  for (size_t i = 0; i < args.size(); ++i) {
    std::string& arg = args[i];
    if (arg == "--") return;
    if (arg.size() < 2 || arg[0] != '-') {
      if (command == nullptr) command = find_command(app, arg);
      continue;
    }
    const bool is_long = arg[1] == '-';
    const size_t end = is_long ? std::min(arg.find('='), arg.size()) : size_t{2};
    if (is_long) std::replace(arg.begin() + 2, arg.begin() + static_cast<long>(end), '_', '-');
    const std::string name = arg.substr(0, end);
    CLI::App& scope = command == nullptr ? app : *command;
    const CLI::Option* option = scope.get_option_no_throw(name);
    if (option == nullptr) {
      throw UsageError(str_cat("unknown flag ", name,
                               is_long ? did_you_mean(name, long_flags(scope)) : std::string()));
    }
    if (end == arg.size()) i += static_cast<size_t>(option->get_items_expected_min());
  }
}

int run(std::vector<std::string> args) {
  CLI::App app("Gated DeltaNet and its relatives: train, evaluate and run them.", "gdn");
  app.set_version_flag("--version", version);
  app.get_formatter()->column_width(38);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  Run chosen;
  add_bench_command(app, chosen);
  add_demo_command(app, chosen);
  add_eval_command(app, chosen);
  add_generate_command(app, chosen);
  add_info_command(app, chosen);
  add_mixers_command(app, chosen);
  add_plot_command(app, chosen);
  add_train_command(app, chosen);
  app.footer("`gdn COMMAND --help` lists the flags of a command; they may be written with - or _.");

  CLI::App* command = nullptr;
  const auto wrong_usage = [&](const std::string& what) {
    const std::string name = command == nullptr ? "gdn" : "gdn " + command->get_name();
    return report(what, 2, "`" + name + " --help` lists what is possible");
  };
  if (args.empty()) return wrong_usage("no command given");
  try {
    normalize(app, args, command);
    std::reverse(args.begin(), args.end());  // the order in which CLI11 takes them
    app.parse(args);
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    return wrong_usage(error.what());
  } catch (const UsageError& error) {
    return wrong_usage(error.what());
  }
  return chosen();
}

}  // namespace

int run_main(int argc, char** argv) {
  try {
    const int status = run(std::vector<std::string>(argv + 1, argv + argc));
    std::cout.flush();
    return status == 0 && !std::cout ? report("cannot write to stdout", 1) : status;
  } catch (const Interrupted& error) {
    return report(error.what(), 130);
  } catch (const UsageError& error) {
    return report(error.what(), 2);
  } catch (const c10::Error& error) {
    return report(debugging() ? error.what() : error.what_without_backtrace(), 1);
  } catch (const std::bad_alloc&) {
    return report("out of memory", 1, "a smaller batch, sequence length or model needs less");
  } catch (const std::exception& error) {
    return report(error.what(), 1);
  }
}

}  // namespace gdn
