// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/machine.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>

namespace gdn {
namespace {

// A line "NAME:   1234 kB" of /proc/self/status, in bytes; 0 where there is none.
int64_t status_bytes(const std::string& name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(name + ":")) return std::stoll(line.substr(name.size() + 1)) * 1024;
  return 0;
}

}  // namespace

double measure_gemm_peak(c10::ScalarType dtype) {
  using Clock = std::chrono::steady_clock;
  c10::NoGradGuard no_grad;
  constexpr int64_t kSize = 1024;
  const at::Tensor a = at::ones({kSize, kSize}, dtype), b = at::ones({kSize, kSize}, dtype);
  at::Tensor c = at::empty({kSize, kSize}, dtype);
  at::mm_out(c, a, b);  // wakes the threads and packs once
  double best = 1e30;
  const auto begin = Clock::now();
  for (int i = 0; i < 2 || Clock::now() - begin < std::chrono::milliseconds(100); ++i) {
    const auto start = Clock::now();
    at::mm_out(c, a, b);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return 2.0 * kSize * kSize * kSize / best;
}

int64_t resident_memory() { return status_bytes("VmRSS"); }
int64_t peak_resident_memory() { return status_bytes("VmHWM"); }
void reset_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace gdn
