// SPDX-License-Identifier: Apache-2.0
#include "bench/fma_peak.h"

#include <algorithm>
#include <ctime>
#include <thread>
#include <vector>

#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/fma_peak.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Runs `rounds` times 10 independent multiply-adds of one vector; returns their number of
// operations.
double fma_rounds(int rounds, float* sink) {
  constexpr int kSums = 10;  // enough to hide the latency on two ports, few enough for 16 registers
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, 1.0f + *sink), y = hn::Set(d, 1e-9f + *sink);
  hn::Vec<decltype(d)> sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  for (int r = 0; r < rounds; ++r) {
    for (int i = 0; i < kSums; ++i) sum[i] = hn::MulAdd(sum[i], x, y);
  }
  float total = 0.0f;
  for (int i = 0; i < kSums; ++i) total += hn::GetLane(sum[i]);
  *sink = total > 1e30f ? 1.0f : 0.0f;
  return 2.0 * kSums * rounds * static_cast<double>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::bench {
namespace {
HWY_EXPORT(fma_rounds);

// Processor time of this thread, so that other programs on the machine do not lower the yardstick.
double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

double measure_fma_peak(int threads) {
  double best = 0.0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::vector<double> rates(threads);
    const auto work = [&](int i) {
      float sink = 0.0f;
      const double start = thread_seconds();
      const double flops = HWY_DYNAMIC_DISPATCH(fma_rounds)(4000000, &sink);
      rates[i] = flops * 1e-9 / (thread_seconds() - start);
    };
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
    work(0);
    for (auto& t : pool) t.join();
    double total = 0.0;
    for (const double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

double fma_peak_gflops(int threads) {
  static const double peak = measure_fma_peak(threads);
  return peak;
}

}  // namespace gdn::bench
#endif
