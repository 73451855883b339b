// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>

namespace gdn {
namespace {

TEST(DType, EveryFloat16ValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Float16 h{static_cast<uint16_t>(bits)};
    const float f = to_float(h);
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(to_float(to_f16(f))));
    } else {
      EXPECT_EQ(to_f16(f).bits, bits) << f;
    }
  }
}

TEST(DType, Float16RoundsToNearestEven) {
  EXPECT_EQ(to_float(to_f16(2049.0f)), 2048.0f);
  EXPECT_EQ(to_float(to_f16(2051.0f)), 2052.0f);
  EXPECT_TRUE(std::isinf(to_float(to_f16(65520.0f))));
  EXPECT_EQ(to_float(to_f16(65519.0f)), 65504.0f);
  EXPECT_EQ(to_float(to_f16(0x1.8p-25f)), 0x1p-24f);
  EXPECT_EQ(to_float(to_f16(0x1p-25f)), 0.0f);
}

TEST(DType, BFloat16RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(to_float(to_bf16(1.0f + 0x1p-8f)), 1.0f);
  EXPECT_EQ(to_float(to_bf16(1.0f + 0x1.8p-8f)), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(to_float(to_bf16(NAN))));
  EXPECT_TRUE(std::isinf(to_float(to_bf16(INFINITY))));
}

}  // namespace
}  // namespace gdn
