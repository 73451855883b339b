// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/delta_rule/plan.h"

#include <algorithm>
#include <numeric>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/common.h"

namespace gdn::delta_rule {
namespace {

// What the states of a task may take of a core's L2. Heads that go through a sequence together
// share its pages and lines, but their states leave L1 between chunks.
constexpr size_t kStateBytes = 512 << 10;
constexpr int64_t kMaxHeads = 4;

struct Lengths {
  explicit Lengths(const DeltaRuleParams& x) : order(x.num_sequences) {
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int64_t n) {
      const TokenRange range = sequence_range(x, n);
      return range.end - range.begin;
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return length(a) > length(b); });
    if (!order.empty()) longest = static_cast<double>(length(order[0]));
    equal = longest * static_cast<double>(x.num_sequences) == static_cast<double>(x.total_tokens);
  }
  // Tokens that the busiest of `threads` goes through, a sequence being `heads` times `parts`
  // tasks.
  double busiest(const DeltaRuleParams& x, int64_t heads, int64_t threads,
                 int64_t parts = 1) const {
    const double part = longest / static_cast<double>(parts);
    const double share = static_cast<double>(x.total_tokens * heads) / static_cast<double>(threads);
    if (!equal) return std::max(part, share);
    const int64_t tasks = x.num_sequences * heads * parts;
    return part * static_cast<double>((tasks + threads - 1) / threads);
  }
  std::vector<int64_t> order;  // sequences, longest first
  double longest = 0;
  bool equal;
};

// Heads per task: as many as fit, but so few that all threads have work to the end.
int64_t heads_per_task(const DeltaRuleParams& x, int64_t heads, size_t bytes, int64_t threads) {
  const int64_t fit = std::max<int64_t>(1, kStateBytes / std::max<size_t>(1, bytes));
  for (int64_t g = std::min(kMaxHeads, fit); g > 1; --g) {
    const int64_t tasks = x.num_sequences * (heads / g);
    if (heads % g == 0 && (tasks % threads == 0 || tasks >= 4 * threads)) return g;
  }
  return 1;
}

std::vector<Task> cut(const Lengths& lengths, int64_t heads, int64_t per_task, size_t panels,
                      size_t parts) {
  std::vector<Task> tasks;
  tasks.reserve(lengths.order.size() * static_cast<size_t>(heads) * parts);
  for (const int64_t n : lengths.order) {
    for (int64_t h = 0; h < heads; h += per_task) {
      for (size_t i = 0; i < parts; ++i) {
        tasks.push_back(
            {n, h, std::min(heads, h + per_task), panels * i / parts, panels * (i + 1) / parts});
      }
    }
  }
  return tasks;
}

}  // namespace

Plan forward_plan(const DeltaRuleParams& x, size_t panels, size_t state_bytes) {
  const Lengths lengths(x);
  const int64_t threads = num_threads();
  // Each part of the values computes the scores again, about a tenth of a whole head's work.
  constexpr double kAgain = 0.1;
  size_t parts = 1;
  double best = lengths.busiest(x, x.HV, threads);
  for (size_t i = 2; i <= panels && threads > 1; ++i) {
    const double again = 1.0 + kAgain * static_cast<double>(i - 1);
    const double busiest = again * lengths.busiest(x, x.HV, threads, static_cast<int64_t>(i));
    if (busiest < 0.95 * best) {
      best = busiest;
      parts = i;
    }
  }
  Plan plan;
  plan.heads = parts > 1 ? 1 : heads_per_task(x, x.HV, state_bytes, threads);
  plan.tasks = cut(lengths, x.HV, plan.heads, panels, parts);
  return plan;
}

Plan backward_plan(const DeltaRuleParams& x, size_t state_bytes) {
  const Lengths lengths(x);
  const int64_t threads = num_threads(), group = x.HV / x.H;
  const double share = lengths.busiest(x, x.H, 1) / static_cast<double>(threads);
  // Too short for the waiting to pay.
  constexpr double kLong = 256;
  Plan plan;
  plan.together = lengths.longest >= kLong && lengths.busiest(x, x.H, threads) > 1.25 * share;
  const size_t states = static_cast<size_t>(segment(x) / chunk_size(x) + 1) * group;
  plan.heads = plan.together ? x.H : heads_per_task(x, x.H, state_bytes * states, threads);
  plan.tasks = cut(lengths, x.H, plan.heads, 1, 1);
  return plan;
}

}  // namespace gdn::delta_rule
