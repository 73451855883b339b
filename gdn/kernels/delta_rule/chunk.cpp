// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/chunk.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/backward-inl.h"
#include "gdn/kernels/delta_rule/forward-inl.h"
#include "gdn/kernels/delta_rule/scratch.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Builds a Worker on this thread's scratch memory; a dry construction tells how much it takes.
template <typename Worker>
Worker make_worker(const DeltaRuleParams& params) {
  Carver dry(nullptr);
  Worker{params, dry};
  Carver carve(delta_rule::thread_scratch(dry.used()));
  return Worker(params, carve);
}

template <typename T>
void run_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  parallel_for(0, params.num_sequences * params.HV, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_worker<Forward<T>>(params);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / params.HV;
      worker.run(out, n, task % params.HV, offsets[n]);
    }
  });
}

template <typename T>
void run_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  const std::vector<int64_t> offsets = delta_rule::saved_offsets(params);
  parallel_for(0, params.num_sequences * params.H, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_worker<Backward<T>>(params);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / params.H;
      worker.run(saved, grads, n, task % params.H, offsets[n]);
    }
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
