// SPDX-License-Identifier: Apache-2.0
#include "bench/delta_rule_table.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <ctime>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "bench/bandwidth.h"
#include "bench/delta_rule_problem.h"
#include "gdn/base/file.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/timing.h"
#include "gdn/kernels/simd/pairs.h"
#include "gdn/kernels/simd/targets.h"

namespace gdn::bench {
namespace {

using Function = std::function<void()>;

// Processor time where one thread runs, so that other programs count less, else time on the clock.
double now() {
  timespec t;
  clock_gettime(num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Median seconds of each, called in turn, for `stretch` seconds at a time.
std::vector<double> medians(const std::vector<Function>& functions, double budget = 0.4,
                            double stretch = 0) {
  return medians_in_turn(functions,
                         {.seconds = budget, .patience = 5, .stretch = stretch, .now = now});
}

// Pins the threads of parallel_for to a CPU each: every one waits for the others, so that none gets
// two of the calls.
void pin_threads() {
  const int n = num_threads();
  if (static_cast<size_t>(n) > allowed_cpus().size()) return;
  std::atomic<int> arrived{0};
  parallel_for(0, n, 1, [&](int64_t, int64_t) {
    pin_this_thread(arrived.fetch_add(1));
    while (arrived.load() < n) std::this_thread::yield();
  });
}

class Table {
 public:
  // `at_least`: the goal is a lower bound.
  void row(const std::string& name, bool at_least, double goal, double figure, const char* unit,
           const std::string& note = "") {
    const bool met = at_least ? figure >= goal : figure <= goal;
    const TimedCalls calls = timed_calls();
    if (calls.all > last_.all) {
      alone_ = static_cast<double>(calls.alone - last_.alone) /
               static_cast<double>(calls.all - last_.all);
      last_ = calls;
    }
    std::printf("| %s | %d | %s %.2f | %.3f %s | %s | %.0f %% | %s |\n", name.c_str(),
                num_threads(), at_least ? ">=" : "<=", goal, figure, unit, met ? "yes" : "no",
                100 * alone_, note.c_str());
    std::fflush(stdout);
    char line[512];
    std::snprintf(
        line, sizeof(line),
        " {\"name\": \"%s\", \"goal\": %.3f, \"goal_is\": \"%s\", \"figure\": %.4f, "
        "\"unit\": \"%s\", \"met\": %s, \"threads\": %d, \"simd\": \"%s\", \"alone\": %.3f, "
        "\"note\": \"%s\"}",
        name.c_str(), goal, at_least ? "at least" : "at most", figure, unit, met ? "true" : "false",
        num_threads(), simd_target(), alone_, note.c_str());
    json_ += (json_.empty() ? "" : ",\n") + std::string(line);
  }
  std::string json() const { return "[\n" + json_ + "\n]\n"; }

 private:
  std::string json_;
  TimedCalls last_{0, 0};
  double alone_ = 0;  // share of the last row's calls that had their cores alone
};

Function forward_of(Problem& p) {
  return [&p] { delta_rule_chunk_forward(p.x, {p.o.data(), nullptr, nullptr}); };
}
Function training_of(Problem& p) {
  return [&p] {
    delta_rule_chunk_forward(p.x, {p.o.data(), nullptr, p.saved.data()});
    delta_rule_chunk_backward(p.x, p.saved.data(), p.grads);
  };
}

std::string text(const char* format, double x) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), format, x);
  return buffer;
}

// The best that was seen of the multiply-adds of this SIMD target, this time included: others may
// be at work on the cores for longer than one measurement.
double fma_peak() {
  static std::map<std::string, double> best;
  double& peak = best[simd_target()];
  return peak = std::max(peak, fma_gflops(num_threads()));
}

void speed_rows(Table& table) {
  fma_peak();
  for (const int64_t T : {512, 4096}) {
    for (const int64_t H : {16, 32}) {
      Problem p({1, T, H, H, 128, 128});
      const auto t = medians({forward_of(p), training_of(p)}, 0.6);
      const double peak = fma_peak();
      const std::string shape = " T=" + std::to_string(T) + " H=" + std::to_string(H);
      table.row("forward" + shape, true, 0.70, p.forward_flops * 1e-9 / t[0] / peak, "of FMA peak",
                text("%.2f ms", t[0] * 1e3));
      table.row("forward + backward" + shape, false, 4.0, t[1] / t[0], "forwards",
                text("%.2f ms", t[1] * 1e3) +
                    text(", %.2f of FMA peak",
                         (p.forward_flops + p.backward_flops) * 1e-9 / t[1] / peak));
    }
  }
}

void decode_rows(Table& table) {
  for (const int64_t heads : {16, 32, 64, 128, 256, 512}) {
    const int64_t B = heads / 16;
    Problem p({B, 1, 16, 16, 128, 128});
    PageVector<float> pool(heads * 128 * 128, 0.01f);
    PageVector<uint16_t> half(pool.size(), 0x3c00);
    std::vector<int64_t> slots(B);
    std::iota(slots.rbegin(), slots.rend(), 0);
    // In stretches: each finds in the caches what it left there itself.
    const auto t =
        medians({[&] {
                   delta_rule_step(p.x, {pool.data(), B, slots.data()}, p.o.data());
                 },
                 [&] {
                   delta_rule_step(p.x, {half.data(), B, slots.data(), /*bf16=*/true}, p.o.data());
                 },
                 [&] { update_in_place(pool.data(), pool.size(), 16384); },
                 [&] { read_then_update(pool.data(), pool.size(), 16384); }},
                0.6, 0.01);
    const double step = t[0], half_step = t[1], update = t[2], twice = t[3];
    const std::string name = "decode step, B x H = " + std::to_string(heads);
    // What is read for the update must be read before it, and a state is larger than L1: it goes
    // by twice.
    table.row(name, true, 0.85, update / step, "of rmw bandwidth",
              text("%.1f us; ", step * 1e6) +
                  text("two bare passes reach %.2f of rmw bandwidth", update / twice));
    table.row(name + ", beside two bare passes", true, 0.85, twice / step,
              "of a pass that reads and one that updates each state");
    if (heads == 512) table.row(name + ", bf16 state", true, 1.7, step / half_step, "x fp32 state");
  }
}

void family_rows(Table& table) {
  Problem gdn({1, 512, 16, 16, 128, 128});
  Problem kda({1, 512, 16, 16, 128, 128, DeltaGate::kChannel});
  const auto t =
      medians({forward_of(gdn), forward_of(kda), training_of(gdn), training_of(kda)}, 1.0);
  table.row("KDA forward", false, 1.5, t[1] / t[0], "x GDN");
  table.row("KDA forward + backward", false, 1.7, t[3] / t[2], "x GDN");
}

// bf16 inputs on the backend that multiplies bf16, against the same inputs in fp32.
void bf16_rows(Table& table) {
  if (pair_kernels() == nullptr) return;
  const bool amx = pair_kernels()->backend == PairBackend::kAmx;
  const int threads = num_threads();
  const double peak = (amx ? amx_gflops(threads) : bf16_gflops(threads)).value_or(0);
  for (const bool channel : {false, true}) {
    for (const int64_t T : {512, 4096}) {
      const DeltaGate gate = channel ? DeltaGate::kChannel : DeltaGate::kScalar;
      Shape shape{1, T, 16, 16, 128, 128, gate};
      Problem full(shape);
      shape.bf16 = true;
      Problem half(shape);
      const auto t =
          medians({forward_of(full), forward_of(half), training_of(full), training_of(half)}, 0.8);
      const std::string name = std::string(channel ? "KDA " : "") + "bf16 forward";
      const std::string which = " T=" + std::to_string(T) + " H=16, " + pair_backend();
      const auto note = [&](double flops, double seconds) {
        return text("%.2f ms", seconds * 1e3) +
               text(", %.2f of the bf16 peak", flops * 1e-9 / seconds / peak);
      };
      table.row(name + which, true, amx ? channel ? 2.5 : 3.0 : 1.5, t[0] / t[1], "x our fp32",
                note(half.forward_flops, t[1]));
      table.row(name + " + backward" + which, true, amx ? 2.5 : 1.5, t[2] / t[3], "x our fp32",
                note(half.forward_flops + half.backward_flops, t[3]));
    }
  }
}

void size_rows(Table& table) {
  Problem base({1, 512, 16, 16, 128, 128});
  const auto compare = [&](const std::string& name, Shape shape, double goal) {
    Problem p(shape);
    const auto t = medians({forward_of(base), forward_of(p), training_of(base), training_of(p)});
    table.row("forward, " + name, false, goal, t[1] / p.forward_flops / (t[0] / base.forward_flops),
              "x time per flop of 128");
    const double ours = t[3] / (p.forward_flops + p.backward_flops);
    table.row("forward + backward, " + name, false, goal,
              ours / (t[2] / (base.forward_flops + base.backward_flops)), "x time per flop of 128");
  };
  for (const int64_t size : {64, 96, 100, 192, 200, 256}) {
    compare("K=V=" + std::to_string(size), {1, 512, 16, 16, size, size},
            size % 16 == 0 ? 1.25 : 1.5);
  }
  for (const int64_t group : {2, 4}) {
    compare("HV=" + std::to_string(group) + "H", {1, 512, 8, 8 * group, 128, 128}, 1.25);
  }
}

// With as much to spare.
bool fits_in_memory(double bytes) {
  const double pages = static_cast<double>(sysconf(_SC_PHYS_PAGES));
  return 2 * bytes < pages * static_cast<double>(sysconf(_SC_PAGE_SIZE));
}

void length_rows(Table& table) {
  constexpr int64_t kBase = 512;
  Problem base({1, kBase, 16, 16, 128, 128});
  for (const int64_t T : {kBase, int64_t{2048}, int64_t{8192}, int64_t{32768}, int64_t{65536}}) {
    // Backward's inputs, outputs and what forward keeps for it: 11 times a tensor of values.
    const bool training = fits_in_memory(11.0 * 4 * 16 * 128 * static_cast<double>(T));
    Problem p({1, T, 16, 16, 128, 128}, training);
    const auto compare = [&](const std::string& what, const Function& short_one,
                             const Function& long_one) {
      // The short one's second call finds in the caches what its first one left.
      const auto t = medians({short_one, short_one, long_one});
      table.row(what + " T=" + std::to_string(T), false, 1.10,
                t[2] / static_cast<double>(T) / (t[1] / static_cast<double>(kBase)),
                "x time per token of T=512");
    };
    if (T > kBase) compare("forward", forward_of(base), forward_of(p));
    if (!training) continue;
    if (T > kBase) compare("forward + backward", training_of(base), training_of(p));
    const double inputs =
        static_cast<double>(p.q.size() + p.k.size() + p.v.size() + p.g.size() + p.beta.size());
    table.row("workspace T=" + std::to_string(T), false, 1.5,
              static_cast<double>(p.saved.size()) / inputs, "x the inputs");
  }
}

void packed_rows(Table& table) {
  Problem equal({8, 512, 16, 16, 128, 128}), mixed({8, 512, 16, 16, 128, 128});
  mixed.cut({0, 1500, 1600, 1637, 2400, 2464, 3900, 4031, 4096});
  const auto t =
      medians({forward_of(equal), forward_of(mixed), training_of(equal), training_of(mixed)}, 1.5);
  table.row("packed sequences of 37 to 1500 tokens, forward", false, 1.15, t[1] / t[0],
            "x equal lengths");
  table.row("packed sequences of 37 to 1500 tokens, forward + backward", false, 1.15, t[3] / t[2],
            "x equal lengths");
}

void few_heads_rows(Table& table) {
  const int threads = num_threads();
  if (threads < 2) return;
  for (const int64_t H : {1, 2, 3}) {
    Problem p({1, 4096, H, H, 128, 128});
    const auto on = [threads](int n, const Function& f) {  // the clock is that of `threads`
      return [n, f, threads] {
        set_num_threads(n);
        f();
        set_num_threads(threads);
      };
    };
    // In stretches: threads that sleep through another's turn have to be woken first.
    const auto t = medians(
        {on(1, forward_of(p)), on(2, forward_of(p)), on(1, training_of(p)), on(2, training_of(p))},
        1.6, 0.1);
    const std::string name = ", T=4096, B x HV = " + std::to_string(H);
    const auto times = [](double one, double two) {
      return text("%.2f ms, ", one * 1e3) + text("%.2f ms", two * 1e3);
    };
    table.row("forward" + name, true, 1.7, t[0] / t[1], "x one thread", times(t[0], t[1]));
    table.row("forward + backward" + name, true, 1.7, t[2] / t[3], "x one thread",
              times(t[2], t[3]));
  }
}

void avx2_rows(Table& table) {
  if (!limit_simd_targets("avx2")) return;
  fma_peak();
  Problem p({1, 512, 16, 16, 128, 128});
  const auto t = medians({forward_of(p)});
  table.row("forward on AVX2", true, 0.70, p.forward_flops * 1e-9 / t[0] / fma_peak(),
            "of AVX2's FMA peak", text("%.2f ms", t[0] * 1e3));
}

struct Group {
  std::string name;
  void (*print)(Table&);
};
const Group kGroups[] = {{"speed", speed_rows},   {"decode", decode_rows},
                         {"family", family_rows}, {"bf16", bf16_rows},
                         {"sizes", size_rows},    {"lengths", length_rows},
                         {"packed", packed_rows}, {"few", few_heads_rows},
                         {"avx2", avx2_rows}};  // last: the limit stays

}  // namespace

int print_delta_rule_table(const std::string& filter, const std::string& json_file) {
  const auto wanted = [&](const Group& group) {
    return group.name.find(filter) != std::string::npos;
  };
  if (std::none_of(std::begin(kGroups), std::end(kGroups), wanted)) {
    std::fprintf(stderr, "bench_delta_rule: --table: no group is named %s; there are",
                 filter.c_str());
    for (const Group& group : kGroups) std::fprintf(stderr, " %s", group.name.c_str());
    std::fprintf(stderr, "\n");
    return 2;
  }
  if (!json_file.empty()) check_writable(json_file);
  Table table;
  pin_threads();
  std::printf(
      "| what | threads | goal | figure | met | alone | note |\n|---|---|---|---|---|---|---|\n");
  for (const Group& group : kGroups) {
    if (wanted(group)) group.print(table);
  }
  if (!json_file.empty()) atomic_write_file(json_file, table.json());
  return 0;
}

}  // namespace gdn::bench
