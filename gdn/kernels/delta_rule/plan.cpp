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

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What single threads shall do head by head, and what is left that they would do at unequal shares.
struct Cut {
  std::vector<int64_t> order;  // sequences, longest first
  std::vector<int64_t> whole;  // heads of each for single threads: the first ones
  int64_t left = 0;            // heads of all sequences that are left
};

// Sequences of equal lengths: as many heads as are a multiple of the threads. Others: all but those
// of sequences that are longer than a thread's share of the tokens. Sequences of less than
// `shortest` tokens are not worth more threads.
Cut cut_heads(const DeltaRuleParams& x, int64_t heads, int64_t threads, int64_t shortest) {
  Cut cut{std::vector<int64_t>(x.num_sequences), std::vector<int64_t>(x.num_sequences, heads)};
  std::iota(cut.order.begin(), cut.order.end(), 0);
  const auto length = [&](int64_t n) { return sequence_span(x, n).size(); };
  std::stable_sort(cut.order.begin(), cut.order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  if (threads == 1 || cut.order.empty()) return cut;
  const int64_t longest = length(cut.order[0]);
  if (longest < shortest) return cut;
  if (longest * x.num_sequences == x.total_tokens) {
    cut.left = x.num_sequences * heads % threads;
    int64_t left = cut.left;
    for (auto n = cut.order.rbegin(); left > 0; ++n) {
      cut.whole[*n] = std::max<int64_t>(0, heads - left);
      left -= heads - cut.whole[*n];
    }
    return cut;
  }
  for (const int64_t n : cut.order) {
    if (length(n) < shortest || length(n) * threads <= x.total_tokens * heads) break;
    cut.whole[n] = 0;
    cut.left += heads;
  }
  return cut;
}

// Heads per task: as many as fit, but so few that all threads have work to the end.
int64_t heads_per_task(const Cut& cut, size_t bytes, int64_t threads) {
  const int64_t fit = std::max<int64_t>(1, kStateBytes / std::max<size_t>(1, bytes));
  for (int64_t g = std::min(kMaxHeads, fit); g > 1; --g) {
    int64_t tasks = 0, rest = 0;
    for (const int64_t heads : cut.whole) {
      tasks += heads / g;
      rest += heads % g;
    }
    if (rest == 0 && (tasks % threads == 0 || tasks >= 4 * threads)) return g;
  }
  return 1;
}

void add_whole(const DeltaRuleParams& x, const Cut& cut, int64_t n, Plan& plan) {
  for (int64_t h = 0; h < cut.whole[n]; h += plan.heads) {
    plan.tasks.push_back({n, h, h + plan.heads, 0, x.V});
  }
}

// Pieces to cut a head into by columns of values, so that `heads` of them take `threads` the
// shortest time. A piece costs what belongs to the keys alone, too.
int64_t best_pieces(int64_t heads, int64_t panels, int64_t threads) {
  constexpr double kKeys = 0.17;  // of a head's time, measured at K = V = 128
  int64_t best = 1;
  double least = 0;
  for (int64_t pieces = 1; pieces <= panels; ++pieces) {
    const double share =
        static_cast<double>(divide_up(panels, pieces)) / static_cast<double>(panels);
    const double time =
        static_cast<double>(divide_up(heads * pieces, threads)) * (kKeys + (1.0 - kKeys) * share);
    if (pieces > 1 && time >= least) continue;
    best = pieces;
    least = time;
  }
  return best;
}

// Whether all threads on one head after the other are through with `heads` sooner than threads on
// their own.
bool better_together(int64_t heads, int64_t panels, int64_t threads) {
  // With a price for waiting; the recurrence of the states is shared out by panels.
  constexpr double kWaiting = 1.15, kByPanels = 0.4;
  const double rows = static_cast<double>(std::min(threads, panels));
  const double one = kByPanels / rows + (1.0 - kByPanels) / static_cast<double>(threads);
  return kWaiting * static_cast<double>(heads) * one <
         static_cast<double>(divide_up(heads, threads));
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

Plan forward_plan(const DeltaRuleParams& x, int64_t panel_width, size_t state_bytes) {
  const int64_t threads = num_threads(), panels = divide_up(x.V, panel_width);
  const Cut cut = cut_heads(x, x.HV, threads, /*shortest=*/128);
  Plan plan;
  plan.heads = heads_per_task(cut, state_bytes, threads);
  const int64_t columns = divide_up(panels, best_pieces(cut.left, panels, threads)) * panel_width;
  plan.tasks.reserve((x.num_sequences * x.HV - cut.left) / plan.heads +
                     cut.left * divide_up(x.V, columns));
  for (const int64_t n : cut.order) {
    add_whole(x, cut, n, plan);
    for (int64_t h = cut.whole[n]; h < x.HV; ++h) {
      for (int64_t v = 0; v < x.V; v += columns) {
        plan.tasks.push_back({n, h, h + 1, v, std::min(x.V, v + columns)});
      }
    }
  }
  return plan;
}

Plan backward_plan(const DeltaRuleParams& x, int64_t panel_width, size_t state_bytes) {
  const int64_t threads = num_threads(), panels = divide_up(x.V, panel_width);
  const Cut cut = cut_heads(x, x.H, threads, /*shortest=*/512);
  const bool together = better_together(cut.left, panels, threads);
  const int64_t states = segment(x) / chunk_size(x) + 1;
  Plan plan;
  plan.heads =
      heads_per_task(cut, state_bytes * static_cast<size_t>(states * (x.HV / x.H)), threads);
  plan.tasks.reserve((x.num_sequences * x.H - cut.left) / plan.heads + (together ? 0 : cut.left));
  plan.together.reserve(together ? cut.left : 0);
  for (const int64_t n : cut.order) {
    add_whole(x, cut, n, plan);
    for (int64_t h = cut.whole[n]; h < x.H; ++h) {
      (together ? plan.together : plan.tasks).push_back({n, h, h + 1, 0, x.V});
    }
  }
  return plan;
}

}  // namespace gdn::delta_rule
