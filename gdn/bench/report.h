// SPDX-License-Identifier: Apache-2.0
// How the commands `gdn bench ...` measure and report: pinned threads, medians, one row per figure
// with its share of a measured ceiling, as a table while it runs and as JSON at the end.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "gdn/bench/timing.h"

namespace gdn::bench {

struct Options {
  std::vector<int64_t> threads;  // each in turn
  double seconds = 0.5;          // of measuring per row
  std::string filter;            // rows whose name contains it; "": all
  bool json = false;             // one JSON object on stdout instead of the table
  std::string out;               // "": no file
  std::string config;            // TOML of a run: the model of train and decode
  std::string mixer;             // train and decode: in place of the model's own; "": none
  std::string dtype = "all";     // fp32, bf16, all
  int64_t tokens = 512;          // decode: how many
  int64_t interval = 0;          // decode: tokens per line; 0: 8 lines
  int64_t hidden_size = 512;     // mixers
  std::string version;           // of this program, for the report
};

struct Row {
  explicit Row(std::string name, int threads, double seconds = 0, double rate = 0,
               std::string unit = "")
      : name(std::move(name)),
        threads(threads),
        seconds(seconds),
        rate(rate),
        unit(std::move(unit)) {}

  std::string name;
  int threads;
  double seconds;      // median; 0: none
  double rate;         // work per second in `unit`; 0: none
  std::string unit;    // "GFLOP/s", "GB/s", "tok/s"
  double ceiling = 0;  // what the machine allows, in `unit`; 0: not known
  // More figures, printed at the end of the line: "vs torch" -> "3.1x".
  std::vector<std::pair<std::string, nlohmann::ordered_json>> extra;
};

class Report {
 public:
  // `what`: the command, "ops". Writes the table to `out`, unless JSON is asked for. Throws where
  // the file that the options ask for can't be written.
  Report(std::string what, const Options& options, std::ostream& out);

  // torch's threads become n, each pinned to a CPU of its own where there are enough; a note says
  // where there are not.
  void use_threads(int64_t n);
  void heading(const std::string& text);  // over the rows that follow, if any do
  void add(Row row);                      // if its name is wanted
  void note(const std::string& text);     // in the table and in JSON's "notes"
  bool wanted(const std::string& name) const;
  // The JSON object, on stdout and in the file where the options ask for them. Throws UsageError
  // where the filter left no row.
  void finish();

 private:
  std::string what_;
  Options options_;
  void print(const std::string& line);

  std::ostream& out_;
  std::string heading_;  // not yet printed
  TimedCalls calls_before_ = timed_calls();
  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
  nlohmann::ordered_json notes_ = nlohmann::ordered_json::array();
};

// This machine and this build, as JSON's "machine" and "versions".
nlohmann::ordered_json machine_info();
nlohmann::ordered_json version_info(const Options& options);

// Median seconds of each function, called in turn for about `seconds` in all, as medians_in_turn
// does.
std::vector<double> median_seconds(const std::vector<std::function<void()>>& functions,
                                   double seconds, bool warm = false);
double median_seconds(const std::function<void()>& function, double seconds);

// The commands. Each returns the exit status.
int run_ceilings(const Options& options);
int run_ops(const Options& options);
int run_mixers(const Options& options);
int run_train(const Options& options);
int run_decode(const Options& options);

}  // namespace gdn::bench
