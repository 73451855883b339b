// SPDX-License-Identifier: Apache-2.0
// What the small kernels' own instructions take, with no waiting for memory: the same kernels on
// rows that stay in L1. Torch-free.
#pragma once

#include <cstdint>
#include <functional>

#include "gdn/base/dtype.h"

namespace gdn::bench {

enum class SmallKernel : uint8_t {
  kShortConv,  // W=4, SiLU
  kRmsNorm,    // with a weight
  kGatedNorm,  // of heads of 128, SiLU
  kL2Norm,     // of heads of 128
  kSwiglu,     //
  kGate,       // of channels, softplus
  kCrossEntropy
};

// Seconds per element, while `threads` threads run it on rows of their own. It is what twice as
// many rows take longer than some, so that what a call takes whatever its size does not count;
// where other programs' work hides that, all that twice as many take.
struct SmallKernelTimes {
  double forward, backward;
};
SmallKernelTimes in_l1(SmallKernel kernel, DType dtype, int threads);

// One such call, to be looked at by itself.
struct SmallCall {
  int64_t elements;
  std::function<void()> run;
};
SmallCall small_call(SmallKernel kernel, DType dtype, bool backward, int64_t times);

}  // namespace gdn::bench
