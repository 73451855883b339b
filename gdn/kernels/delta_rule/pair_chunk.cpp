// SPDX-License-Identifier: Apache-2.0
// The chunk form with bf16 products: dispatch over instruction sets. Which instruction multiplies
// is the choice of simd/pairs.h; this is about everything between the products.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/pair_chunk.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/kernels/delta_rule/pair_backward-inl.h"
#include "gdn/kernels/delta_rule/pair_forward-inl.h"
#include "gdn/kernels/delta_rule/run-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

void run_pair_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  run_forward<PairForward>(params, out);
}
void run_pair_backward(const DeltaRuleParams& params, const void* saved,
                       const DeltaRuleGrads& grads) {
  run_backward<PairBackward>(params, saved, grads);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#if HWY_ONCE
namespace gdn::delta_rule {
namespace {
HWY_EXPORT(run_pair_forward);
HWY_EXPORT(run_pair_backward);
}  // namespace

void pair_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  HWY_DYNAMIC_DISPATCH(run_pair_forward)(params, out);
}
void pair_backward(const DeltaRuleParams& params, const void* saved, const DeltaRuleGrads& grads) {
  HWY_DYNAMIC_DISPATCH(run_pair_backward)(params, saved, grads);
}

}  // namespace gdn::delta_rule
#endif
