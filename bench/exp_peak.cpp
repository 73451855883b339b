// SPDX-License-Identifier: Apache-2.0
#include "bench/exp_peak.h"

#include <algorithm>
#include <ctime>
#include <vector>

#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/exp_peak.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// y = exp(x) of `count` numbers, a multiple of the lanes, `rounds` times.
void exp_rounds(int rounds, int count, const float* x, float* y) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int r = 0; r < rounds; ++r) {
    for (int i = 0; i < count; i += lanes) hn::StoreU(hn::Exp(d, hn::LoadU(d, x + i)), d, y + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::bench {
namespace {
HWY_EXPORT(exp_rounds);

// Processor time of this thread, so that other programs on the machine do not lower the yardstick.
double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double measure_exp_peak() {
  constexpr int kCount = 2048, kRounds = 20000;
  std::vector<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = -0.005f * static_cast<float>(i);
  double best = 0.0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const double start = thread_seconds();
    HWY_DYNAMIC_DISPATCH(exp_rounds)(kRounds, kCount, x.data(), y.data());
    best = std::max(best, 1e-9 * kCount * kRounds / (thread_seconds() - start));
  }
  return best;
}

}  // namespace

double exp_peak_giga() {
  static const double peak = measure_exp_peak();
  return peak;
}

}  // namespace gdn::bench
#endif
