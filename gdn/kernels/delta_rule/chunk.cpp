// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/chunk.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include <atomic>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/backward_run-inl.h"
#include "gdn/kernels/delta_rule/forward-inl.h"
#include "gdn/kernels/delta_rule/plan.h"
#include "gdn/kernels/delta_rule/scratch.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Builds a Worker on this thread's scratch memory; a dry construction tells how much it takes.
template <typename Worker, typename... Args>
Worker make_worker(Args&&... args) {
  Carver dry(nullptr);
  Worker{args..., dry};
  Carver carve(delta_rule::thread_scratch(dry.used()));
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

// Runs the tasks of a plan, each by one thread with a ByHead, or one after the other with a
// Together.
template <typename ByHead, typename Together, typename Work>
void run_plan(const DeltaRuleParams& params, const delta_rule::Plan& plan, Work work) {
  if (plan.together) {
    auto worker = make_worker<Together>(params);
    for (const auto& task : plan.tasks) work(worker, task);
    return;
  }
  share_out(
      plan.tasks, [&] { return make_worker<ByHead>(params, plan.heads); }, work);
}

template <typename T>
void run_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  const Layout<T> L(params);
  const auto plan = delta_rule::forward_plan(params, L.panels, L.state_size() * sizeof(T));
  run_plan<ForwardByHead<T>, ForwardTogether<T>>(
      params, plan, [&](auto& worker, const delta_rule::Task& task) {
        worker.run(out, task.n, task.h0, task.h1, offsets[task.n]);
      });
}

template <typename T>
void run_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  const Layout<T> L(params);
  const auto plan = delta_rule::backward_plan(params, L.panels, L.state_size() * sizeof(T));
  run_plan<BackwardByHead<T>, BackwardTogether<T>>(
      params, plan, [&](auto& worker, const delta_rule::Task& task) {
        worker.run(static_cast<const T*>(saved), grads, task.n, task.h0, task.h1, offsets[task.n]);
      });
}

void chunk_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  params.dtype == DType::kF64 ? run_forward<double>(params, out) : run_forward<float>(params, out);
}
void chunk_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  params.dtype == DType::kF64 ? run_backward<double>(params, saved, grads)
                              : run_backward<float>(params, saved, grads);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#if HWY_ONCE
#include "gdn/base/check.h"

namespace gdn {
namespace {
HWY_EXPORT(chunk_forward);
HWY_EXPORT(chunk_backward);
}  // namespace

int64_t delta_rule_saved_size(const DeltaRuleParams& params) {
  delta_rule::check_params(params, "delta_rule_saved_size");
  return delta_rule::saved_offsets(params).back();
}

void delta_rule_chunk_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_chunk_forward");
  delta_rule::check_outputs(params, out, "delta_rule_chunk_forward");
  HWY_DYNAMIC_DISPATCH(chunk_forward)(params, out);
}

void delta_rule_chunk_backward(const DeltaRuleParams& params, const void* saved,
                               const DeltaRuleGrads& grads) {
  delta_rule::check_params(params, "delta_rule_chunk_backward");
  delta_rule::check_grads(params, grads, "delta_rule_chunk_backward");
  GDN_CHECK(saved != nullptr || delta_rule::saved_offsets(params).back() == 0,
            "[delta_rule_chunk_backward] saved must be what the forward pass stored there");
  HWY_DYNAMIC_DISPATCH(chunk_backward)(params, saved, grads);
}

}  // namespace gdn
#endif
