// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/chunk.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/kernels/delta_rule/run-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

void chunk_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  params.dtype == DType::kF64 ? run_forward<ChunkForward<double>>(params, out)
                              : run_forward<ChunkForward<float>>(params, out);
}
void chunk_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  params.dtype == DType::kF64 ? run_backward<ChunkBackward<double>>(params, saved, grads)
                              : run_backward<ChunkBackward<float>>(params, saved, grads);
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
  if (delta_rule::by_pairs(params)) return delta_rule::pair_forward(params, out);
  HWY_DYNAMIC_DISPATCH(chunk_forward)(params, out);
}

void delta_rule_chunk_backward(const DeltaRuleParams& params, const void* saved,
                               const DeltaRuleGrads& grads) {
  delta_rule::check_params(params, "delta_rule_chunk_backward");
  delta_rule::check_grads(params, grads, "delta_rule_chunk_backward");
  GDN_CHECK(saved != nullptr || delta_rule::saved_offsets(params).back() == 0,
            "[delta_rule_chunk_backward] saved must be what the forward pass stored there");
  if (delta_rule::by_pairs(params)) return delta_rule::pair_backward(params, saved, grads);
  HWY_DYNAMIC_DISPATCH(chunk_backward)(params, saved, grads);
}

}  // namespace gdn
#endif
