// SPDX-License-Identifier: Apache-2.0
// Tests that run once on each backend of bf16 products; AMX emulated where the CPU lacks it.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "gdn/kernels/simd/pairs.h"
#include "tests/kernels/amx_emulator.h"

namespace gdn {

class PairBackendTest : public testing::TestWithParam<const char*> {
 public:
  // False where this machine cannot run it at all, or GDN_SIMD leaves it out.
  static bool choose(const std::string& name) {
    if (name == "amx" && find_pair_kernels("amx") == nullptr) {
      if (!amx_emulator::install() || !internal::choose_unchecked_amx()) return false;
    } else if (!choose_pairs(name.c_str())) {
      return false;
    }
    return pair_backend() == name;
  }

 protected:
  void SetUp() override {
    if (!choose(GetParam())) {
      choose_pairs(std::getenv("GDN_BF16"));
      GTEST_SKIP() << "this CPU, or GDN_SIMD, leaves out " << GetParam();
    }
    before_ = amx_emulator::counts();
  }
  void TearDown() override {
    choose_pairs(std::getenv("GDN_BF16"));
    if (IsSkipped()) return;
    const auto after = amx_emulator::counts();
    EXPECT_EQ(amx_emulator::configured_threads(), 0) << "tiles were not released";
    EXPECT_EQ(after.configurations - before_.configurations, after.releases - before_.releases);
  }

 private:
  amx_emulator::Counts before_ = {};
};

inline auto pair_backends() { return testing::Values("emulated", "avx512", "amx"); }
inline std::string backend_name(const testing::TestParamInfo<const char*>& info) {
  return info.param;
}

}  // namespace gdn
