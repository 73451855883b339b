// SPDX-License-Identifier: Apache-2.0
// Runs the tasks of a plan on workers made of chunks. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_RUN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_RUN_INL_H_
#undef GDN_KERNELS_DELTA_RULE_RUN_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_RUN_INL_H_
#endif

#include <algorithm>
#include <atomic>
#include <vector>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/backward_run-inl.h"
#include "gdn/kernels/delta_rule/forward-inl.h"
#include "gdn/kernels/delta_rule/plan.h"
#include "gdn/kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Builds a Worker on this thread's scratch memory; a dry construction tells how much it takes.
template <typename Worker, typename... Args>
Worker make_worker(Args&&... args) {
  Carver dry(nullptr);
  Worker{args..., dry};
  Carver carve(thread_scratch(dry.used()));
  return Worker(args..., carve);
}

// Calls work(worker, task) for every task. Threads take the next one when they are free: tasks are
// of different lengths, and so are threads' shares of the machine.
template <typename MakeWorker, typename Work>
void share_out(const std::vector<delta_rule::Task>& tasks, MakeWorker make, Work work) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(num_threads(), tasks.size());
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    size_t i = next.fetch_add(1);
    if (i >= tasks.size()) return;
    auto worker = make();
    for (; i < tasks.size(); i = next.fetch_add(1)) work(worker, tasks[i]);
  });
}

template <typename Chunk>
void run_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  const auto L = Chunk::layout(params);
  const auto plan =
      delta_rule::forward_plan(params, L.PW, L.state_size() * sizeof(typename Chunk::T));
  share_out(
      plan.tasks, [&] { return make_worker<Forward<Chunk>>(params, plan.heads); },
      [&](auto& worker, const delta_rule::Task& task) { worker.run(out, task, offsets[task.n]); });
}

template <typename Chunk>
void run_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  using T = typename Chunk::T;
  const auto L = Chunk::layout(params);
  const auto plan = delta_rule::backward_plan(params, L.PW, L.state_size() * sizeof(T));
  const auto work = [&](auto& worker, const delta_rule::Task& task) {
    worker.run(static_cast<const T*>(saved), grads, task, offsets[task.n]);
  };
  share_out(
      plan.tasks, [&] { return make_worker<BackwardByHead<Chunk>>(params, plan.heads); }, work);
  if (plan.together.empty()) return;
  auto worker = make_worker<BackwardTogether<Chunk>>(params);
  for (const auto& task : plan.together) work(worker, task);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
