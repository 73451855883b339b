// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/attend_step.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/attend_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

#ifndef GDN_ATTEND_STEP_ONCE  // what does not depend on the SIMD target
#define GDN_ATTEND_STEP_ONCE
namespace gdn::attend_step_detail {

// Tokens of a segment: enough work for a thread, few enough that its scores stay in L1.
inline constexpr int64_t kSegment = 256;
// Tokens whose products with a query are summed together.
inline constexpr int64_t kTokens = 4;

}  // namespace gdn::attend_step_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// scores[s] = q . k_s for `count` tokens that lie `stride` apart.
template <typename T>
HWY_INLINE void score_tokens(const T* k, int64_t stride, int64_t count, const Acc<T>* q, int64_t K,
                             Acc<T>* scores) {
  using attend_step_detail::kTokens;
  using A = Acc<T>;
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d), whole = K - K % lanes;
  int64_t s = 0;
  for (; s + kTokens <= count; s += kTokens) {
    const T* row = k + s * stride;
    hn::Vec<decltype(d)> sum[kTokens];
    for (int64_t j = 0; j < kTokens; ++j) sum[j] = hn::Zero(d);
    for (int64_t i = 0; i < whole; i += lanes) {
      const auto x = hn::LoadU(d, q + i);
      for (int64_t j = 0; j < kTokens; ++j)
        sum[j] = hn::MulAdd(x, load_as(d, row + j * stride + i), sum[j]);
    }
    for (int64_t j = 0; j < kTokens; ++j) {
      A total = hn::GetLane(hn::SumOfLanes(d, sum[j]));
      for (int64_t i = whole; i < K; ++i) total += q[i] * load(row + j * stride + i);
      scores[s + j] = total;
    }
  }
  for (; s < count; ++s) {
    const T* row = k + s * stride;
    scores[s] = sum_lanes<A>(K, [&](auto tag, int64_t i) HWY_ATTR {
      return hn::Mul(hn::LoadU(tag, q + i), load_as(tag, row + i));
    });
  }
}

// What a segment adds for one query head: sum_s e^(score_s - largest) v_s [V], behind it the sum of
// those weights and `largest`.
template <typename T>
void attend_segment(const AttendStepParams& p, int64_t b, int64_t head, int64_t first,
                    int64_t count, const Acc<T>* q, Acc<T>* scores, Acc<T>* partial) {
  using A = Acc<T>;
  const T* k = static_cast<const T*>(p.k) + b * p.k_batch + first * p.k_stride + head * p.K;
  const T* v = static_cast<const T*>(p.v) + b * p.v_batch + first * p.v_stride + head * p.V;
  const int64_t group = p.H / p.HK;
  for (int64_t g = 0; g < group; ++g) {
    A* out = partial + g * (p.V + 2);
    score_tokens(k, p.k_stride, count, q + g * p.K, p.K, scores);
    A largest = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < count; ++s) largest = std::max(largest, scores[s]);
    // Scores of minus infinity only have no weight, and are no numbers where there are no others.
    const A top = std::max(largest, std::numeric_limits<A>::lowest());
    for_lanes<A>(count, [&](auto d, int64_t s) HWY_ATTR {
      const auto below = hn::Sub(hn::LoadU(d, scores + s), hn::Set(d, top));
      hn::StoreU(exp_of(d, below), d, scores + s);
    });
    A weight = 0;
    for (int64_t s = 0; s < count; ++s) weight += scores[s];
    // Four vectors of values at a time stay in registers along the tokens.
    const hn::ScalableTag<A> d;
    const int64_t lanes = hn::Lanes(d);
    int64_t i = 0;
    for (; i + 4 * lanes <= p.V; i += 4 * lanes) {
      auto a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
      for (int64_t s = 0; s < count; ++s) {
        const T* row = v + s * p.v_stride + i;
        const auto w = hn::Set(d, scores[s]);
        a0 = hn::MulAdd(w, load_as(d, row), a0);
        a1 = hn::MulAdd(w, load_as(d, row + lanes), a1);
        a2 = hn::MulAdd(w, load_as(d, row + 2 * lanes), a2);
        a3 = hn::MulAdd(w, load_as(d, row + 3 * lanes), a3);
      }
      hn::StoreU(a0, d, out + i);
      hn::StoreU(a1, d, out + i + lanes);
      hn::StoreU(a2, d, out + i + 2 * lanes);
      hn::StoreU(a3, d, out + i + 3 * lanes);
    }
    for_lanes<A>(p.V - i, [&](auto tag, int64_t j) HWY_ATTR {
      auto sum = hn::Zero(tag);
      for (int64_t s = 0; s < count; ++s)
        sum = hn::MulAdd(hn::Set(tag, scores[s]), load_as(tag, v + s * p.v_stride + i + j), sum);
      hn::StoreU(sum, tag, out + i + j);
    });
    out[p.V] = weight;
    out[p.V + 1] = largest;
  }
}

template <typename T>
void attend_step_t(const AttendStepParams& p, void* o) {
  using A = Acc<T>;
  using attend_step_detail::kSegment;
  const int64_t segments = (p.S + kSegment - 1) / kSegment, group = p.H / p.HK;
  const int64_t size = p.V + 2;
  const auto carve_all = [&](Carver carve, A*& q, A*& partial, A*& sum) {
    q = carve.take<A>(p.B * p.H * p.K);
    partial = carve.take<A>(p.B * p.HK * segments * group * size);
    sum = carve.take<A>(p.V);
    return carve.used();
  };
  A *q, *partial, *sum;
  carve_all(Carver(thread_scratch(carve_all(Carver(nullptr), q, partial, sum))), q, partial, sum);
  for (int64_t i = 0; i < p.B * p.H * p.K; ++i)
    q[i] = static_cast<A>(p.scale) * load(static_cast<const T*>(p.q) + i);
  // partial [B, HK, segments, group, V + 2]
  parallel_for(0, p.B * p.HK * segments, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
    A scores[kSegment];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % segments * kSegment, pair = task / segments;
      attend_segment<T>(p, pair / p.HK, pair % p.HK, first, std::min(kSegment, p.S - first),
                        q + pair * group * p.K, scores, partial + task * group * size);
    }
  });
  for (int64_t row = 0; row < p.B * p.H; ++row) {
    const A* parts = partial + (row / group * segments * group + row % group) * size;
    const auto part = [&](int64_t segment) { return parts + segment * group * size; };
    A largest = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < segments; ++s) largest = std::max(largest, part(s)[p.V + 1]);
    std::fill_n(sum, p.V, A{0});
    A weight = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const A factor = std::exp(part(s)[p.V + 1] - largest);
      weight += factor * part(s)[p.V];
      for (int64_t i = 0; i < p.V; ++i) sum[i] += factor * part(s)[i];
    }
    T* out = static_cast<T*>(o) + row * p.V;
    for (int64_t i = 0; i < p.V; ++i) store(out + i, sum[i] / weight);
  }
}

void attend_step_any(const AttendStepParams& p, void* o) {
  dispatch_dtype(p.dtype, [&](auto zero) { attend_step_t<decltype(zero)>(p, o); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {
namespace {

HWY_EXPORT(attend_step_any);

void check(const AttendStepParams& p) {
  GDN_CHECK(p.B >= 0, "[attend_step] B must be at least 0, got ", p.B);
  GDN_CHECK(p.S >= 1 && p.K >= 1 && p.V >= 1, "[attend_step] S, K and V must be at least 1, got ",
            p.S, ", ", p.K, ", ", p.V);
  GDN_CHECK(p.HK >= 1 && p.H >= 1 && p.H % p.HK == 0,
            "[attend_step] the heads of keys must divide those of queries, got ", p.HK, " and ",
            p.H);
}

}  // namespace

void attend_step(const AttendStepParams& p, void* o) {
  check(p);
  HWY_DYNAMIC_DISPATCH(attend_step_any)(p, o);
}

void attend_step_naive(const AttendStepParams& p, double* o) {
  check(p);
  dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](const void* data, int64_t i) {
      return static_cast<double>(load(static_cast<const T*>(data) + i));
    };
    for (int64_t row = 0; row < p.B * p.H; ++row) {
      const int64_t b = row / p.H, head = row % p.H / (p.H / p.HK);
      std::vector<double> weights(p.S);
      double largest = -std::numeric_limits<double>::infinity(), total = 0;
      for (int64_t s = 0; s < p.S; ++s) {
        for (int64_t i = 0; i < p.K; ++i) {
          weights[s] += p.scale * at(p.q, row * p.K + i) *
                        at(p.k, b * p.k_batch + s * p.k_stride + head * p.K + i);
        }
        largest = std::max(largest, weights[s]);
      }
      for (double& w : weights) total += w = std::exp(w - largest);
      for (int64_t i = 0; i < p.V; ++i) {
        double sum = 0;
        for (int64_t s = 0; s < p.S; ++s)
          sum += weights[s] / total * at(p.v, b * p.v_batch + s * p.v_stride + head * p.V + i);
        o[row * p.V + i] = sum;
      }
    }
  });
}

}  // namespace gdn
#endif  // HWY_ONCE
