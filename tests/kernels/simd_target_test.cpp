// SPDX-License-Identifier: Apache-2.0
// The choice of instruction sets. ctest runs this whole program under GDN_SIMD=avx2 and baseline
// too.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/kernels/simd_target_test.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "hwy/highway.h"
#include "hwy/targets.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

const char* compiled_for() {
  return HWY_TARGET == HWY_AVX3 ? "avx512" : HWY_TARGET == HWY_AVX2 ? "avx2" : "baseline";
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(compiled_for);

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

// What is chosen must be what simd_target() says, before and after anybody asks for it.
TEST(SimdTarget, KernelsRunOnTheOneThatIsNamed) {
  const int64_t before = hwy::SupportedTargets();
  const auto check = [](const char* what) {
    const std::string first = HWY_DYNAMIC_DISPATCH(compiled_for)(), named = simd_target();
    EXPECT_EQ(first, named) << what;
    EXPECT_EQ(std::string(HWY_DYNAMIC_DISPATCH(compiled_for)()), named) << what;
  };
  check("as it was");
  for (const char* name : {"avx512", "avx2", "baseline"}) {
    if (limit_simd_targets(name)) {
      EXPECT_EQ(std::string(simd_target()), name);
    }
    check(name);
  }
  hwy::SetSupportedTargetsForTest(before);
  check("back again");
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
#endif  // HWY_ONCE
