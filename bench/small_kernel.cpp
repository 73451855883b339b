// SPDX-License-Identifier: Apache-2.0
// One call of a small kernel on rows that stay in L1, for tools/instruction_bound.py:
//   bench_small_kernel KERNEL fp32|bf16 forward|backward [--trace TIMES]
// Without --trace it prints the seconds per element. With it, it prints how many elements TIMES
// rows have, and calls the kernel between two breakpoints, so that who traces the process sees
// where to begin and to end.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "gdn/base/parallel.h"
#include "gdn/bench/small_kernels.h"

namespace {

void breakpoint() {
#if defined(__x86_64__)
  asm volatile("int3");
#endif
}

}  // namespace

int main(int argc, char** argv) {
  using gdn::bench::SmallKernel;
  const std::map<std::string, SmallKernel> kernels = {
      {"short_conv", SmallKernel::kShortConv},
      {"rms_norm", SmallKernel::kRmsNorm},
      {"gated_norm", SmallKernel::kGatedNorm},
      {"l2_norm", SmallKernel::kL2Norm},
      {"swiglu", SmallKernel::kSwiglu},
      {"channel_gate", SmallKernel::kGate},
      {"cross_entropy", SmallKernel::kCrossEntropy}};
  const bool trace = argc == 6 && std::strcmp(argv[4], "--trace") == 0;
  if ((argc != 4 && !trace) || kernels.count(argv[1]) == 0) {
    std::fprintf(stderr,
                 "usage: bench_small_kernel KERNEL fp32|bf16 forward|backward [--trace TIMES]\n"
                 "kernels:");
    for (const auto& [name, kernel] : kernels) std::fprintf(stderr, " %s", name.c_str());
    std::fprintf(stderr, "\n");
    return 2;
  }
  const SmallKernel kernel = kernels.at(argv[1]);
  const gdn::DType dtype = std::strcmp(argv[2], "bf16") == 0 ? gdn::DType::kBF16 : gdn::DType::kF32;
  const bool backward = std::strcmp(argv[3], "backward") == 0;
  gdn::set_num_threads(1);
  if (!trace) {
    const auto seconds = gdn::bench::in_l1(kernel, dtype, 1);
    std::printf("%g\n", backward ? seconds.backward : seconds.forward);
    return 0;
  }
  const auto call = gdn::bench::small_call(kernel, dtype, backward, std::atoi(argv[5]));
  std::printf("%lld\n", static_cast<long long>(call.elements));
  std::fflush(stdout);
  call.run();
  breakpoint();
  call.run();
  breakpoint();
}
