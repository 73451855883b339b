// SPDX-License-Identifier: Apache-2.0
// What the kernels' tests share: random data of each storage type, comparison against
// double-precision oracles, finite differences, and running the same check on every SIMD target and
// several numbers of threads.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/dtype.h"
#include "gdn/base/parallel.h"
#include "gdn/base/rng.h"
#include "hwy/targets.h"

namespace gdn::testing {

template <typename T>
std::vector<T> random_normal(int64_t n, uint64_t seed, double scale = 1.0, double mean = 0.0) {
  Rng rng(seed);
  std::vector<T> out(n);
  for (T& x : out) store(&x, static_cast<Acc<T>>(mean + scale * rng.normal()));
  return out;
}

template <typename T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& x : values) out.push_back(load(&x));
  return out;
}

// How far a result may lie from the oracle: rounding to the storage type, and fp32 arithmetic of a
// few dozen steps.
template <typename T>
double tolerance() {
  if (std::is_same_v<T, double>) return 1e-12;
  if (std::is_same_v<T, float>) return 1e-5;
  return std::is_same_v<T, BFloat16> ? 0x1.1p-8 : 0x1.1p-11;
}

// The same for results of storage type T's kernels that stay in the accumulation type: sums, gates.
template <typename T>
double acc_tolerance(double fp32 = 1e-5) {
  return std::is_same_v<T, double> ? 1e-12 : fp32;
}

// |actual - expected| <= tol * (|expected| + root mean square of expected) for every element.
template <typename T>
void expect_close(const std::vector<T>& actual, const std::vector<double>& expected, double tol,
                  const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double square = 0;
  for (double e : expected) square += e * e;
  const double rms = expected.empty() ? 0 : std::sqrt(square / expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = load(&actual[i]);
    ASSERT_LE(std::abs(a - expected[i]), tol * (std::abs(expected[i]) + rms) + 1e-30)
        << what << " at " << i << ": " << a << " for " << expected[i];
  }
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Central differences of loss() by the elements of `x`, which it reads and which stay as they were,
// must agree with `gradient`.
inline void expect_gradient(std::vector<double>& x, const std::vector<double>& gradient,
                            const std::function<double()>& loss, const std::string& what,
                            double tol = 1e-7) {
  ASSERT_EQ(x.size(), gradient.size()) << what;
  double square = 0;
  for (double g : gradient) square += g * g;
  const double rms = std::sqrt(square / std::max<size_t>(1, gradient.size()));
  ASSERT_GT(rms, 0) << what << ": a gradient of zeros tests nothing";
  for (size_t i = 0; i < x.size(); ++i) {
    const double keep = x[i], step = 1e-5 * std::max(1.0, std::abs(keep));
    x[i] = keep + step;
    const double up = loss();
    x[i] = keep - step;
    const double down = loss();
    x[i] = keep;
    ASSERT_NEAR((up - down) / (2 * step), gradient[i], tol * (std::abs(gradient[i]) + rms))
        << what << " at " << i;
  }
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Runs `f` with each SIMD target that this machine and the kernels' build have, and with the
// portable fallback.
inline void for_each_target(const std::function<void(const std::string&)>& f) {
  const int64_t supported = hwy::SupportedTargets();
  for (const int64_t target : {HWY_AVX3, HWY_AVX2, HWY_NEON, HWY_SCALAR}) {
    if ((supported & target) == 0 && target != HWY_SCALAR) continue;
    hwy::SetSupportedTargetsForTest(target);
    f(hwy::TargetName(target));
  }
  hwy::SetSupportedTargetsForTest(supported);  // not 0, which would lift the limit of GDN_SIMD
}

// The bytes that `run` returns must not depend on the number of threads.
template <typename Run>
void expect_same_bits_for_any_threads(Run run) {
  const int before = num_threads();
  set_num_threads(1);
  const auto one = run();
  for (const int threads : {2, 3, 7}) {
    set_num_threads(threads);
    EXPECT_TRUE(same_bits(one, run())) << threads << " threads";
  }
  set_num_threads(before);
}

using StorageTypes = ::testing::Types<double, float, BFloat16, Float16>;

}  // namespace gdn::testing
