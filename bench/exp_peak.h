// SPDX-License-Identifier: Apache-2.0
// The rate of fp32 exponentials this machine reaches within L1: the yardstick of the elementwise
// recurrences.
#pragma once

namespace gdn::bench {

// 1e9 exponentials per second of one thread, best of several short runs, measured once per process.
double exp_peak_giga();

}  // namespace gdn::bench
