// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/report.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <cstdio>
#include <iostream>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/base/parallel.h"
#include "gdn/bench/ceilings.h"
#include "gdn/kernels/simd/targets.h"

namespace gdn::bench {
namespace {

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text),
                value >= 99.95   ? "%.0f"
                : value >= 9.995 ? "%.1f"
                                 : "%.2f",
                value);
  return text;
}

std::string duration(double seconds) {
  if (seconds < 1e-3) return number(1e6 * seconds) + " us";
  return seconds < 1 ? number(1e3 * seconds) + " ms" : number(seconds) + " s";
}

std::string text_of(const nlohmann::ordered_json& value) {
  if (value.is_string()) return value.get<std::string>();
  return value.is_number_float() ? number(value.get<double>()) : value.dump();
}

}  // namespace

Report::Report(std::string what, const Options& options, std::ostream& out)
    : what_(std::move(what)), options_(options), out_(out) {
  if (!options_.out.empty()) check_writable(options_.out);
  if (options_.json) return;
  const auto machine = machine_info();
  out_ << "gdn bench " << what_ << ": " << text_of(machine["cpu"]) << ", " << machine["cores"]
       << " CPUs, SIMD " << text_of(machine["simd"]) << "; " << options_.version << ", compiler "
       << __VERSION__ << "\n"
       << std::flush;
}

void Report::use_threads(int64_t n) {
  at::set_num_threads(static_cast<int>(n));
  const size_t cpus = allowed_cpus().size();
  const bool pinned = static_cast<size_t>(n) <= cpus;
  parallel_for(0, n, 1, [&](int64_t, int64_t) {
    pin_this_thread(pinned ? at::get_thread_num() : std::numeric_limits<int>::max());
  });
  if (!pinned) note(str_cat(n, " threads on ", cpus, cpus == 1 ? " CPU" : " CPUs", ": not pinned"));
}

void Report::heading(const std::string& text) { heading_ = text; }

void Report::print(const std::string& line) {
  if (options_.json) return;
  if (!heading_.empty()) out_ << "\n" << heading_ << "\n";
  heading_.clear();
  out_ << line << "\n" << std::flush;
}

void Report::add(Row row) {
  if (!wanted(row.name)) return;
  nlohmann::ordered_json json = {{"name", row.name}, {"threads", row.threads}};
  if (row.seconds > 0) json["ms"] = 1e3 * row.seconds;
  if (row.rate > 0) {
    json["rate"] = row.rate;
    json["unit"] = row.unit;
  }
  if (row.ceiling > 0) json["of_ceiling"] = row.rate / row.ceiling;
  for (const auto& [key, value] : row.extra) json[key] = value;
  rows_.push_back(std::move(json));
  if (options_.json) return;
  char line[160];
  const std::string rate = row.rate > 0 ? number(row.rate) + " " + row.unit : "";
  char share[24] = "";
  if (row.ceiling > 0) {
    std::snprintf(share, sizeof(share), "%.0f %% of ceiling", 100 * row.rate / row.ceiling);
  }
  std::snprintf(line, sizeof(line), "%-46s %dT %10s %16s  %-18s", row.name.c_str(), row.threads,
                row.seconds > 0 ? duration(row.seconds).c_str() : "", rate.c_str(), share);
  std::string text = line;
  for (const auto& [key, value] : row.extra) text += "  " + key + " " + text_of(value);
  print(text);
}

void Report::note(const std::string& text) {
  notes_.push_back(text);
  print("note: " + text);
}

bool Report::wanted(const std::string& name) const {
  return name.find(options_.filter) != std::string::npos;
}

void Report::finish() {
  if (rows_.empty() && !options_.filter.empty()) {
    throw UsageError(str_cat("no row of gdn bench ", what_, " has a name that contains \"",
                             options_.filter, "\"; without --filter it prints them all"));
  }
  const TimedCalls calls = timed_calls();
  if (const int64_t all = calls.all - calls_before_.all; all > 0) {
    note(str_cat(100 * (calls.alone - calls_before_.alone) / all,
                 " % of the calls timed had their cores alone; the medians are of these, where "
                 "there are enough"));
  }
  const nlohmann::ordered_json all = {{"bench", what_},
                                      {"machine", machine_info()},
                                      {"versions", version_info(options_)},
                                      {"rows", rows_},
                                      {"notes", notes_}};
  if (options_.json) out_ << all.dump(1) << "\n" << std::flush;
  if (!options_.out.empty()) atomic_write_file(options_.out, all.dump(1) + "\n");
}

nlohmann::ordered_json machine_info() {
  return {{"cpu", cpu_name()}, {"cores", allowed_cpus().size()}, {"simd", simd_target()}};
}

nlohmann::ordered_json version_info(const Options& options) {
  return {{"gdn", options.version}, {"torch", TORCH_VERSION}, {"compiler", __VERSION__}};
}

std::vector<double> median_seconds(const std::vector<std::function<void()>>& functions,
                                   double seconds, bool warm) {
  return medians_in_turn(functions, {.seconds = seconds, .warm = warm});
}

double median_seconds(const std::function<void()>& function, double seconds) {
  return median_seconds(std::vector<std::function<void()>>{function}, seconds)[0];
}

int run_ceilings(const Options& options) {
  Report report("ceilings", options, std::cout);
  // Measures only what is wanted.
  const auto add = [&](const std::string& name, int threads, const char* unit, const auto& rate,
                       Ceilings* of_peak = nullptr) {
    if (!report.wanted(name)) return;
    const std::optional<double> measured = rate();
    if (!measured) return report.note(name + ": not available");
    Row row{name, threads, 0, *measured, unit};
    if (of_peak != nullptr) row.ceiling = of_peak->fma();
    report.add(std::move(row));
  };
  for (const int64_t n : options.threads) {
    const int t = static_cast<int>(n);
    report.use_threads(n);
    report.heading("arithmetic, " + std::to_string(t) + (t == 1 ? " thread" : " threads"));
    Ceilings ceilings(t);
    add(str_cat("fp32 multiply-add, ", simd_target()), t, "GFLOP/s",
        [&] { return ceilings.fma(); });
    add("fp32 multiply-add, AVX2", t, "GFLOP/s", [&] { return avx2_fma_gflops(t); });
    add("bf16 products, AVX512_BF16", t, "GFLOP/s", [&] { return bf16_gflops(t); });
    add("bf16 products, AMX", t, "GFLOP/s", [&] { return amx_gflops(t); });
    for (const auto& [m, n_, k] : {std::tuple<int, int, int>{64, 128, 128},
                                   {32, 128, 128},
                                   {16, 128, 128},
                                   {128, 16, 128},
                                   {128, 32, 16}}) {
      for (const int64_t batch : {1, 6}) {
        const std::string name =
            str_cat("fp32 product ", m, "x", n_, "x", k, batch == 1 ? ", one" : ", of six");
        add(
            name, t, "GFLOP/s", [&] { return small_gemm_gflops(t, m, n_, k, batch); }, &ceilings);
      }
    }
    add("exp, fp32, in L1", t, "Gexp/s", [&] { return exp_grate(t); });
    if (n == options.threads.front()) {
      for (const auto& [name, rate] : unit_rates(t)) {
        add("512 bits: " + name, t, "G/s", [&] { return rate; });
      }
    }
    report.heading("memory, bytes in all");
    for (const int64_t kib :
         {32 * n, 512 * n, int64_t{4096}, int64_t{16384}, int64_t{65536}, int64_t{262144}}) {
      const std::string size = kib >= 1024 ? str_cat(kib / 1024, " MiB") : str_cat(kib, " KiB");
      for (const auto& [what, access] : {std::pair<const char*, Access>{"read ", Access::kRead},
                                         {"read and write in place ", Access::kReadModifyWrite},
                                         {"read one half, write the other ", Access::kCopy}}) {
        add(what + size, t, "GB/s", [&] { return bandwidth_gbs(t, access, kib * 1024); });
      }
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
