// SPDX-License-Identifier: Apache-2.0
// Which instruction sets the hand-vectorised kernels are compiled for. Include before any Highway
// header, in each source file that uses foreach_target.h. x86: the baseline, AVX2 with FMA,
// AVX-512; sets between or above them would only lengthen the build. Vectors of unknown length
// cannot live in arrays, which the register tiles need.
#pragma once

#undef HWY_DISABLED_TARGETS  // the build may have its own, smaller list
#define HWY_DISABLED_TARGETS                                                                 \
  ((HWY_AVX3 - 1) | HWY_SSE4 | HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | \
   HWY_RVV)

#include <cstdlib>

namespace gdn {

// Keeps every kernel to `name` (avx512, avx2, baseline) and the sets below it, for tests and
// comparisons. Says so on stderr and returns false where the name is unknown or this processor does
// not have it. Null or "": no limit. Loading the kernels calls it with GDN_SIMD of the environment.
bool limit_simd_targets(const char* name);

// The set the kernels run on: "avx512", "avx2" or "baseline".
const char* simd_target();

namespace internal {
inline const bool simd_limited = limit_simd_targets(std::getenv("GDN_SIMD"));
}

}  // namespace gdn
