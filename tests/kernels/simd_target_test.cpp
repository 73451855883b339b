// SPDX-License-Identifier: Apache-2.0
// The choice of instruction sets. ctest runs this whole program under GDN_SIMD=avx2 and baseline
// too.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "gdn/kernels/simd/targets.h"
#include "hwy/targets.h"

namespace gdn {
namespace {

TEST(SimdTarget, EnvironmentLimitsIt) {
  const char* wanted = std::getenv("GDN_SIMD");
  const std::string used = simd_target();
  if (wanted == nullptr || std::string(wanted).empty()) {
    const int64_t best = hwy::SupportedTargets() & (HWY_AVX3 | HWY_AVX2);
    EXPECT_EQ(used, best & HWY_AVX3 ? "avx512" : best & HWY_AVX2 ? "avx2" : "baseline");
  } else if (std::string(wanted) == "baseline") {
    EXPECT_EQ(used, "baseline");
  } else {
    EXPECT_TRUE(used == wanted || used == "baseline") << used << " for GDN_SIMD=" << wanted;
  }
}

TEST(SimdTarget, UnknownNamesAreIgnoredWithOneLine) {
  const std::string before = simd_target();
  testing::internal::CaptureStderr();
  EXPECT_FALSE(limit_simd_targets("avx1024"));
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "gdn: GDN_SIMD must be avx512, avx2 or baseline, got avx1024; ignored\n");
  EXPECT_EQ(simd_target(), before);
  EXPECT_TRUE(limit_simd_targets(""));
  EXPECT_EQ(simd_target(), before);
}

}  // namespace
}  // namespace gdn
