// SPDX-License-Identifier: Apache-2.0
// The fp32 multiply-add rate this machine reaches from registers: the yardstick of the kernel
// benchmarks.
#pragma once

namespace gdn::bench {

// GFLOP/s of `threads` threads together, best of several short runs.
double measure_fma_peak(int threads);

// The same, measured once per process.
double fma_peak_gflops(int threads);

}  // namespace gdn::bench
