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
