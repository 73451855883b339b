// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/timing.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <utility>

#include "gdn/base/parallel.h"

namespace gdn::bench {
namespace {

using Clock = std::chrono::steady_clock;

double steady_now() {
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Shares that count as having a core alone: less means the other hardware thread was at work for a
// good part of the probe.
constexpr double kAlone = 0.9;

std::atomic<int64_t> calls_alone{0}, calls{0};

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define GDN_BENCH_ADD "add $1, %0\n"
#else
#define GDN_BENCH_ADD "add %0, %0, #1\n"
#endif
// Additions that wait for each other, one a cycle: what a second thread on the core leaves as it
// is.
int64_t count_cycles(int64_t rounds) {
  uint64_t x = 0;
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile(GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD
                     GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD
                         GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD GDN_BENCH_ADD
                 : "+r"(x));
  }
  return 16 * rounds;
}
#undef GDN_BENCH_ADD
// Instructions that wait for nothing: as many a cycle as the core begins.
int64_t issue(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile(
        "nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\n"
        "nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\n"
        "nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\n");
  }
  return 48 * rounds;
}

// Of the calling thread.
double instructions_per_cycle() {
  const auto rate = [](int64_t (*work)(int64_t), int64_t rounds) {
    const double start = steady_now();
    const int64_t done = work(rounds);
    return static_cast<double>(done) / (steady_now() - start);
  };
  // Interrupts slow the cycles' count: the best of a few.
  double cycles = 0;
  for (int run = 0; run < 4; ++run) cycles = std::max(cycles, rate(count_cycles, 300));
  return rate(issue, 4000) / cycles;
}
#else
double instructions_per_cycle() { return 1; }
#endif

// The fewest that a thread of parallel_for has, all of them at it together; 0 where they do not
// come together.
double least_instructions_per_cycle() {
  constexpr auto kWait = std::chrono::microseconds(200);
  const int threads = num_threads();
  std::atomic<int> arrived{0};
  std::vector<double> found(static_cast<size_t>(threads), 0.0);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    ++arrived;
    const auto start = Clock::now();
    while (arrived < threads && Clock::now() - start < kWait) {
    }
    // Who is alone here would do the others' share on the same core.
    if (arrived == threads) found[static_cast<size_t>(begin)] = instructions_per_cycle();
  });
  return *std::min_element(found.begin(), found.end());
}

// The most that two probes in turn agreed on, since a single one may be wrong.
class Most {
 public:
  Most() {
    // A core that is shared is alone for moments.
    for (const auto start = Clock::now(); Clock::now() - start < std::chrono::milliseconds(20);) {
      see(least_instructions_per_cycle());
    }
  }
  double see(double now) {
    const double both = std::min(now, last_);
    if (both > most_ && std::max(now, last_) < 1.02 * both) most_ = both;
    last_ = now;
    return most_;
  }

 private:
  double most_ = 0, last_ = 0;
};

}  // namespace

double core_share() {
  if (static_cast<size_t>(num_threads()) > allowed_cpus().size()) return 0;
  static std::map<int, Most> by_threads;
  Most& most = by_threads[num_threads()];
  const double now = least_instructions_per_cycle();
  return now > 0 ? std::min(1.0, now / std::max(now, most.see(now))) : 0;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::vector<double> medians_in_turn(const std::vector<std::function<void()>>& functions,
                                    const TimingOptions& options) {
  if (functions.empty()) return {};
  const auto now = options.now != nullptr ? options.now : steady_now;
  std::vector<std::vector<double>> all(functions.size()), alone(functions.size());
  const auto enough = [](const std::vector<std::vector<double>>& samples) {
    return std::all_of(samples.begin(), samples.end(), [](const auto& s) { return s.size() >= 3; });
  };
  for (const auto& f : functions) f();
  // Calls since the last probe, which come to so much that probes are few beside them.
  std::vector<std::pair<size_t, double>> between;
  constexpr double kBetween = 2e-4;
  bool alone_before = core_share() >= kAlone;
  double last_probe = steady_now();
  const double begin = last_probe, limit = options.patience * options.seconds;
  const auto probe = [&] {
    const bool alone_after = core_share() >= kAlone;
    if (alone_before && alone_after) {
      for (const auto& [i, seconds] : between) alone[i].push_back(seconds);
      calls_alone += static_cast<int64_t>(between.size());
    }
    between.clear();
    alone_before = alone_after;
    last_probe = steady_now();
  };
  for (double spent = 0; !enough(all) || (steady_now() - begin < limit && spent < limit &&
                                          (spent < options.seconds || !enough(alone)));) {
    for (size_t i = 0; i < functions.size(); ++i) {
      if (options.warm || options.stretch > 0) functions[i]();
      const double turn = now();
      do {
        const double start = now();
        functions[i]();
        const double seconds = now() - start;
        spent += seconds;
        all[i].push_back(seconds);
        between.emplace_back(i, seconds);
        ++calls;
        if (steady_now() - last_probe >= kBetween) probe();
      } while (now() - turn < options.stretch);
    }
  }
  probe();
  std::vector<double> medians;
  for (auto& samples : enough(alone) ? alone : all) medians.push_back(median(std::move(samples)));
  return medians;
}

TimedCalls timed_calls() { return {calls_alone, calls}; }

}  // namespace gdn::bench
