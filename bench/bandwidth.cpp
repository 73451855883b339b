// SPDX-License-Identifier: Apache-2.0
#include "bench/bandwidth.h"

#include <algorithm>
#include <cstdint>

#include "gdn/base/parallel.h"
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/bandwidth.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// n is a multiple of 64.
void scale(float* x, size_t n, float factor) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto f = hn::Set(d, factor);
  for (size_t i = 0; i < n; i += 4 * lanes) {
    for (size_t j = 0; j < 4; ++j) {
      float* p = x + i + j * lanes;
      hn::StoreU(hn::Mul(f, hn::LoadU(d, p)), d, p);
    }
  }
}

float sum(const float* x, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  hn::Vec<decltype(d)> s[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  for (size_t i = 0; i < n; i += 4 * lanes) {
    for (size_t j = 0; j < 4; ++j) s[j] = hn::Add(s[j], hn::LoadU(d, x + i + j * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s[0], s[1]), hn::Add(s[2], s[3]))));
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {
HWY_EXPORT(scale);
HWY_EXPORT(sum);

namespace bench {

void update_in_place(float* x, size_t n, size_t block) {
  parallel_for(0, static_cast<int64_t>(n / block), 1, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(scale)(x + begin * block, (end - begin) * block, 0.999f);
  });
}

void read_then_update(float* x, size_t n, size_t block) {
  parallel_for(0, static_cast<int64_t>(n / block), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float s = HWY_DYNAMIC_DISPATCH(sum)(x + i * block, block);
      HWY_DYNAMIC_DISPATCH(scale)(x + i * block, block, s > 1e30f ? 1.0f : 0.999f);
    }
  });
}

}  // namespace bench
}  // namespace gdn
#endif
