// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/report.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/base/parallel.h"
#include "gdn/bench/ceilings.h"
#include "gdn/kernels/simd/targets.h"

namespace gdn::bench {
namespace {

using Clock = std::chrono::steady_clock;

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
  if (options_.json) return;
  const auto machine = machine_info();
  out_ << "gdn bench " << what_ << ": " << text_of(machine["cpu"]) << ", " << machine["cores"]
       << " CPUs, SIMD " << text_of(machine["simd"]) << ", torch " << TORCH_VERSION << "\n"
       << std::flush;
}

void Report::heading(const std::string& text) {
  if (!options_.json) out_ << "\n" << text << "\n" << std::flush;
}

void Report::add(Row row) {
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
  out_ << line;
  for (const auto& [key, value] : row.extra) out_ << "  " << key << " " << text_of(value);
  out_ << "\n" << std::flush;
}

void Report::note(const std::string& text) {
  notes_.push_back(text);
  if (!options_.json) out_ << "note: " << text << "\n" << std::flush;
}

bool Report::wanted(const std::string& name) const {
  return name.find(options_.filter) != std::string::npos;
}

void Report::finish() {
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

void use_threads(int64_t n) {
  at::set_num_threads(static_cast<int>(n));
  if (static_cast<size_t>(n) > allowed_cpus().size()) return;
  parallel_for(0, n, 1, [](int64_t, int64_t) { pin_this_thread(at::get_thread_num()); });
}

std::vector<double> median_seconds(const std::vector<std::function<void()>>& functions,
                                   double seconds, bool warm) {
  std::vector<std::vector<double>> samples(functions.size());
  for (const auto& f : functions) f();
  const auto begin = Clock::now();
  const auto elapsed = [](Clock::time_point since) {
    return std::chrono::duration<double>(Clock::now() - since).count();
  };
  while (samples[0].size() < 3 || elapsed(begin) < seconds) {
    for (size_t i = 0; i < functions.size(); ++i) {
      if (warm) functions[i]();
      const auto start = Clock::now();
      functions[i]();
      samples[i].push_back(elapsed(start));
    }
  }
  std::vector<double> medians;
  for (auto& s : samples) {
    const auto middle = s.begin() + static_cast<std::ptrdiff_t>(s.size() / 2);
    std::nth_element(s.begin(), middle, s.end());
    medians.push_back(*middle);
  }
  return medians;
}

double median_seconds(const std::function<void()>& function, double seconds) {
  return median_seconds(std::vector<std::function<void()>>{function}, seconds)[0];
}

int run_ceilings(const Options& options) {
  Report report("ceilings", options, std::cout);
  const auto add = [&](const std::string& name, int threads, double rate, const char* unit) {
    Row row{name, threads};
    row.rate = rate;
    row.unit = unit;
    report.add(std::move(row));
  };
  for (const int64_t n : options.threads) {
    const int t = static_cast<int>(n);
    report.heading("arithmetic, " + std::to_string(t) + (t == 1 ? " thread" : " threads"));
    const double fma = fma_gflops(t);
    add(str_cat("fp32 multiply-add, ", simd_target()), t, fma, "GFLOP/s");
    if (const auto avx2 = avx2_fma_gflops(t)) add("fp32 multiply-add, AVX2", t, *avx2, "GFLOP/s");
    if (const auto bf16 = bf16_gflops(t)) {
      add("bf16 products, AVX512_BF16", t, *bf16, "GFLOP/s");
    } else {
      report.note("bf16 products, AVX512_BF16: not available");
    }
    if (const auto amx = amx_gflops(t)) {
      add("bf16 products, AMX", t, *amx, "GFLOP/s");
    } else {
      report.note("bf16 products, AMX: not available");
    }
    for (const auto& [m, n_, k] : {std::tuple<int, int, int>{64, 128, 128},
                                   {32, 128, 128},
                                   {16, 128, 128},
                                   {128, 16, 128},
                                   {128, 32, 16}}) {
      for (const int64_t batch : {1, 6}) {
        Row row{str_cat("fp32 product ", m, "x", n_, "x", k, batch == 1 ? ", one" : ", of six"), t};
        row.rate = small_gemm_gflops(t, m, n_, k, batch);
        row.unit = "GFLOP/s";
        row.ceiling = fma;
        report.add(std::move(row));
      }
    }
    add("exp, fp32, in L1", t, exp_grate(t), "Gexp/s");
    if (n == options.threads.front()) {
      for (const auto& [name, rate] : unit_rates(t)) add("512 bits: " + name, t, rate, "G/s");
    }
    report.heading("memory, bytes in all");
    for (const int64_t kib :
         {32 * n, 512 * n, int64_t{4096}, int64_t{16384}, int64_t{65536}, int64_t{262144}}) {
      const std::string size = kib >= 1024 ? str_cat(kib / 1024, " MiB") : str_cat(kib, " KiB");
      const int64_t bytes = kib * 1024;
      add("read " + size, t, bandwidth_gbs(t, Access::kRead, bytes), "GB/s");
      add("read and write in place " + size, t, bandwidth_gbs(t, Access::kReadModifyWrite, bytes),
          "GB/s");
      add("read one half, write the other " + size, t, bandwidth_gbs(t, Access::kCopy, bytes),
          "GB/s");
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
