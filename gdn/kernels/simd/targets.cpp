// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/targets.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "hwy/highway.h"
#include "hwy/targets.h"

namespace gdn {
namespace {

// Bits of better targets are lower; 0: not a name.
int64_t target_of(std::string_view name) {
  if (name == "avx512") return HWY_AVX3;
  if (name == "avx2") return HWY_AVX2;
  if (name == "baseline") return HWY_STATIC_TARGET;
  return 0;
}

}  // namespace

bool limit_simd_targets(const char* name) {
  if (name == nullptr || *name == '\0') return true;
  const int64_t wanted = target_of(name);
  if (wanted == 0) {
    std::fprintf(stderr, "gdn: GDN_SIMD must be avx512, avx2 or baseline, got %s; ignored\n", name);
    return false;
  }
  // Not by hwy::DisableTargets(): the next call of SupportedTargets() would have kernels chosen
  // among all targets again.
  const int64_t limited = hwy::SupportedTargets() & ~(wanted - 1);
  hwy::SetSupportedTargetsForTest(limited == 0 ? HWY_STATIC_TARGET : limited);
  const bool available = (hwy::SupportedTargets() & wanted) != 0;
  if (!available) {
    std::fprintf(stderr, "gdn: no %s, by the processor or an earlier limit (GDN_SIMD); using %s\n",
                 name, simd_target());
  }
  return available;
}

const char* simd_target() {
  const int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;
  const int64_t best = targets & -targets;
  if (best == HWY_AVX3) return "avx512";
  if (best == HWY_AVX2) return "avx2";
  return "baseline";
}

}  // namespace gdn
