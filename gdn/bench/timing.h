// SPDX-License-Identifier: Apache-2.0
// Times of calls on cores that others may use as well. A core's two hardware threads share the
// instructions that it can begin in a cycle: while the other one works too, a kernel takes up to
// half as long again, though the clock and the multiply-adds from registers go on as before. In a
// virtual machine the other one may be somebody else's. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace gdn::bench {

// Instructions that the threads of parallel_for begin per cycle just now, the fewest of them all,
// as a share of the most that as many have had in this process: near 1 for who has the core alone,
// near 1/2 for who shares it; 0 where there are more threads than CPUs, or not all are at work
// within 200 us. 1 where it can't be measured. Takes some 10 us, the first time 20 ms. For one
// thread at a time.
double core_share();

// The middle one, the upper of two. Takes one value or more.
double median(std::vector<double> values);

struct TimingOptions {
  double seconds = 0.5;  // of measuring, for all functions together
  // At most so many times as long, to wait for calls that have their cores alone; all else that
  // takes time is counted, too.
  double patience = 2;
  // Each is called once more before every call that counts, so that it finds in the caches what it
  // left there itself, and not what the function before it left.
  bool warm = false;
  // Each is called for so many seconds at a time, after one such call.
  double stretch = 0;
  double (*now)() = nullptr;  // a clock in seconds; null: the steady one
};

// Median seconds of the functions, called once and then in turn, so that the machine's moods meet
// all of them, each at least 3 times: of the calls that had their cores alone where each function
// has 3 or more of these, else of all.
std::vector<double> medians_in_turn(const std::vector<std::function<void()>>& functions,
                                    const TimingOptions& options);

// Calls that medians_in_turn has timed in this process.
struct TimedCalls {
  int64_t alone, all;
};
TimedCalls timed_calls();

}  // namespace gdn::bench
