// SPDX-License-Identifier: Apache-2.0
// Products of bf16 pairs on every backend that this CPU has, against sums in double.
#include "gdn/kernels/simd/pairs.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "gdn/base/rng.h"
#include "gdn/kernels/simd/targets.h"
#include "tests/kernels/pair_backend.h"

namespace gdn {
namespace {

class Pairs : public PairBackendTest {
 protected:
  const PairKernels& kernels() { return *pair_kernels(); }
};

std::vector<float> normal(Rng& rng, size_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = static_cast<float>(rng.normal());
  return v;
}

TEST_P(Pairs, AgreesWithTheEmulation) { EXPECT_TRUE(agrees_with_emulation(kernels())); }

TEST(PairsAgreement, IsDeniedToAWrongProduct) {
  choose_pairs("emulated");
  static const PairKernels right = *pair_kernels();
  choose_pairs(std::getenv("GDN_BF16"));
  PairKernels wrong = right;
  wrong.product = [](const PairProduct& p) {  // writes one number beside C
    right.product(p);
    p.c[p.n] += 1.0f;
  };
  EXPECT_FALSE(agrees_with_emulation(wrong));
  wrong.product = [](const PairProduct& p) {  // forgets the factors
    PairProduct q = p;
    q.keep = nullptr;
    right.product(q);
  };
  EXPECT_FALSE(agrees_with_emulation(wrong));
  EXPECT_TRUE(agrees_with_emulation(right));
}

// Emulation is never left out silently, and it is the tiles that multiply.
TEST(PairsOfAmx, AreMultipliedWhereverTheyCanBeEmulated) {
  if (!amx_emulator::install()) GTEST_SKIP() << "no emulation here, or AMX itself";
  const bool has_avx512 = PairBackendTest::choose("avx512");
  EXPECT_EQ(PairBackendTest::choose("amx"), has_avx512);
  if (has_avx512) {
    const uint64_t before = amx_emulator::counts().products;
    EXPECT_TRUE(agrees_with_emulation(*pair_kernels()));
    EXPECT_GT(amx_emulator::counts().products, before);
    EXPECT_EQ(find_pair_kernels("amx"), nullptr) << "the emulator reaches only who asks for it";
  }
  choose_pairs(std::getenv("GDN_BF16"));
}

TEST_P(Pairs, ProductEqualsTheSumInDouble) {
  Rng rng(1);
  struct Size {
    size_t m, n, k;
  };
  for (const Size s : {Size{16, 16, 32}, {32, 32, 128}, {48, 48, 64}, {16, 32, 96}, {64, 16, 32}}) {
    const size_t lda = s.k + 32, ldb = s.n + 16, ldc = s.n + 16;
    std::vector<BFloat16> a(s.m * lda);
    for (auto& x : a) x = to_bf16(static_cast<float>(rng.normal()));
    const auto b = normal(rng, s.k * ldb), before = normal(rng, s.m * ldc), keep = normal(rng, s.m);
    std::vector<uint32_t> pairs(s.k / 2 * ldb);
    kernels().pack({s.k, s.n, b.data(), ldb}, pairs.data(), ldb);
    for (const int mode : {0, 1, 2}) {  // set, one factor, a factor per row
      auto c = before;
      kernels().begin();
      kernels().product({s.m, s.n, s.k, a.data(), lda, pairs.data(), ldb, c.data(), ldc,
                         mode == 0 ? nullptr : keep.data(), mode == 2 ? size_t{1} : 0});
      kernels().end();
      for (size_t i = 0; i < s.m; ++i) {
        for (size_t j = 0; j < ldc; ++j) {
          const double old = before[i * ldc + j];
          double sum = mode == 0 ? 0.0 : old * keep[mode == 2 ? i : 0], size = std::abs(sum);
          for (size_t l = 0; l < s.k; ++l) {
            const double x = to_float(a[i * lda + l]), y = to_float(to_bf16(b[l * ldb + j]));
            sum += x * y;
            size += std::abs(x * y);
          }
          if (j >= s.n) {
            EXPECT_EQ(c[i * ldc + j], before[i * ldc + j]) << "past the last column";
          } else {
            ASSERT_NEAR(c[i * ldc + j], sum, 2e-6 * size)
                << s.m << "x" << s.n << "x" << s.k << " mode " << mode << " at " << i << "," << j;
          }
        }
      }
    }
  }
}

TEST_P(Pairs, OperandsAreRoundedToNearestEven) {
  Rng rng(2);
  const size_t rows = 6, n = 48, ld = 64;
  auto x = normal(rng, rows * ld);
  x[0] = 1.0f + 0x1p-8f;      // half way, to even: down
  x[1] = 1.0f + 3 * 0x1p-8f;  // half way, to even: up
  x[2] = std::numeric_limits<float>::quiet_NaN();
  x[3] = -std::numeric_limits<float>::infinity();
  x[ld] = -0.0f;
  const std::vector<float> factors = {1.0f, 2.0f, 0.3f, -1.0f, 1e-20f, 1e20f};
  for (const float* f : {static_cast<const float*>(nullptr), factors.data()}) {
    std::vector<BFloat16> rounded(rows * ld, {0x1234});
    std::vector<uint32_t> pairs(rows / 2 * ld, 0x12345678u);
    kernels().round({rows, n, x.data(), ld, f}, rounded.data(), ld);
    kernels().pack({rows, n, x.data(), ld, f}, pairs.data(), ld);
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < ld; ++j) {
        const BFloat16 expected =
            j < n ? to_bf16((f != nullptr ? f[i] : 1.0f) * x[i * ld + j]) : BFloat16{0x1234};
        const uint32_t pair = pairs[i / 2 * ld + j];
        EXPECT_EQ(rounded[i * ld + j].bits, expected.bits) << i << "," << j;
        if (j < n) {
          EXPECT_EQ(i % 2 == 0 ? pair & 0xffffu : pair >> 16, expected.bits) << i << "," << j;
        } else {
          EXPECT_EQ(pair, 0x12345678u) << i << "," << j;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Pairs, pair_backends(), backend_name);

TEST(PairsChoice, UnknownNamesAreIgnoredWithOneLine) {
  choose_pairs(nullptr);
  const std::string before = pair_backend();
  testing::internal::CaptureStderr();
  EXPECT_FALSE(choose_pairs("avx1024"));
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "gdn: GDN_BF16 must be auto, amx, avx512, emulated or off, got avx1024; ignored\n");
  EXPECT_EQ(pair_backend(), before);
  EXPECT_TRUE(choose_pairs("off"));
  EXPECT_EQ(pair_kernels(), nullptr);
  EXPECT_STREQ(pair_backend(), "off");
  choose_pairs(std::getenv("GDN_BF16"));
}

// What the CPU lacks is never run: the default stands in, and one line says so.
TEST(PairsChoice, WhatTheCpuLacksFallsBack) {
  choose_pairs(nullptr);
  const std::string usual = pair_backend();
  for (const char* name : {"amx", "avx512"}) {
    testing::internal::CaptureStderr();
    const bool has = choose_pairs(name);
    const std::string said = testing::internal::GetCapturedStderr();
    if (has) {
      EXPECT_EQ(said, "");
    } else {
      EXPECT_EQ(said, std::string("gdn: this processor has no ") + name +
                          " for bf16 (GDN_BF16); using " + usual + "\n");
      EXPECT_EQ(pair_backend(), usual);
    }
  }
  choose_pairs(std::getenv("GDN_BF16"));
}

// Below AVX-512 by GDN_SIMD no backend uses its instructions.
TEST(PairsChoice, SimdLimitHolds) {
  choose_pairs(nullptr);
  if (std::string(simd_target()) != "avx512") {
    EXPECT_EQ(pair_kernels(), nullptr);
  }
  choose_pairs("emulated");
  EXPECT_STREQ(pair_backend(), "emulated");
  choose_pairs(std::getenv("GDN_BF16"));
}

}  // namespace
}  // namespace gdn
