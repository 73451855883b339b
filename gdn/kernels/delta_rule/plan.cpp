// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/delta_rule/plan.h"

#include <algorithm>
#include <numeric>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/common.h"
#include "gdn/kernels/simd/pairs.h"

namespace gdn::delta_rule {
namespace {

// What the states of a task may take of a core's L2. Heads that go through a sequence together
// share its pages and lines, but their states leave L1 between chunks.
constexpr size_t kStateBytes = 640 << 10;
constexpr int64_t kMaxHeads = 4;

struct Lengths {
  explicit Lengths(const DeltaRuleParams& x) : order(x.num_sequences) {
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int64_t n) {
      const TokenSpan range = sequence_span(x, n);
      return range.size();
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return length(a) > length(b); });
    if (!order.empty()) longest = static_cast<double>(length(order[0]));
    equal = longest * static_cast<double>(x.num_sequences) == static_cast<double>(x.total_tokens);
  }
  // Tokens that the busiest of `threads` goes through, with `heads` tasks per sequence.
  double busiest(const DeltaRuleParams& x, int64_t heads, int64_t threads) const {
    const double share = static_cast<double>(x.total_tokens * heads) / static_cast<double>(threads);
    if (!equal) return std::max(longest, share);
    const int64_t tasks = x.num_sequences * heads;
    return longest * static_cast<double>((tasks + threads - 1) / threads);
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

// `by_panels`: the part of the work that threads on one head share out by panels.
Plan make_plan(const DeltaRuleParams& x, int64_t heads, size_t bytes, size_t panels,
               double by_panels) {
  const Lengths lengths(x);
  const int64_t threads = num_threads();
  const double all = static_cast<double>(threads);
  const double rows = std::min(all, static_cast<double>(panels));
  // With a price for waiting; shorter sequences do not pay it.
  constexpr double kWaiting = 1.15, kLong = 512;
  const double together = kWaiting * static_cast<double>(x.total_tokens * heads) *
                          (by_panels / rows + (1.0 - by_panels) / all);
  Plan plan;
  plan.together = lengths.longest >= kLong && together < lengths.busiest(x, heads, threads);
  plan.heads = plan.together ? heads : heads_per_task(x, heads, bytes, threads);
  plan.tasks.reserve(lengths.order.size() * static_cast<size_t>(heads));
  for (const int64_t n : lengths.order) {
    for (int64_t h = 0; h < heads; h += plan.heads) {
      plan.tasks.push_back({n, h, std::min(heads, h + plan.heads)});
    }
  }
  return plan;
}

}  // namespace

bool by_pairs(const DeltaRuleParams& x) {
  if (x.dtype != DType::kBF16 || x.erase == DeltaErase::kSeparate || x.K % 16 != 0 ||
      x.V % 16 != 0) {
    return false;
  }
  // Depths are padded to 32, so fp32 is faster on less.
  const bool pays = x.K >= 32 && x.V >= 32 && x.total_tokens >= 32 * x.num_sequences;
  return (x.chunk_size == 0 ? pays : x.chunk_size != 16) && pair_kernels() != nullptr;
}

Plan forward_plan(const DeltaRuleParams& x, size_t panels, size_t state_bytes) {
  return make_plan(x, x.HV, state_bytes, panels, 0.8);
}

Plan backward_plan(const DeltaRuleParams& x, size_t panels, size_t state_bytes) {
  const int64_t states = segment(x) / chunk_size(x) + 1;
  return make_plan(x, x.H, state_bytes * static_cast<size_t>(states * (x.HV / x.H)), panels, 0.4);
}

}  // namespace gdn::delta_rule
