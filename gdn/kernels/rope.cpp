// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/rope.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

template <typename T>
void rotate(const RopeParams& p, const std::vector<double>& frequencies, T* y) {
  using A = Acc<T>;
  const int64_t half = p.rotary_dim / 2, row_size = p.heads * p.dim;
  // 2 pi as the sum of two doubles: the multiple of it that is taken off an angle is exact to about
  // 1e-16 of the angle.
  constexpr double kTwoPi = 2 * std::numbers::pi, kTwoPiLow = 2.4492935982947064e-16;
  parallel_for(0, p.tokens, row_grain(2 * row_size), [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<A> angle(half), cosine(half), sine(half);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t i = 0; i < half; ++i) {
        const double f = static_cast<double>(p.positions[token]) * frequencies[i];
        const double turns = std::nearbyint(f / kTwoPi);
        angle[i] = static_cast<A>(std::fma(-turns, kTwoPiLow, std::fma(-turns, kTwoPi, f)));
      }
      for_lanes<A>(half, [&](auto d, int64_t i) HWY_ATTR {
        const auto f = hn::LoadU(d, angle.data() + i);
        hn::StoreU(hn::Cos(d, f), d, cosine.data() + i);
        const auto s = hn::Sin(d, f);
        hn::StoreU(p.inverse ? hn::Neg(s) : s, d, sine.data() + i);
      });
      for (int64_t head = 0; head < p.heads; ++head) {
        const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(token * p.heads + head, p.dim);
        T* out = y + (token * p.heads + head) * p.dim;
        for_lanes<A>(half, [&](auto d, int64_t i) HWY_ATTR {
          const auto c = hn::LoadU(d, cosine.data() + i), s = hn::LoadU(d, sine.data() + i);
          const auto a = load_as(d, x + i), b = load_as(d, x + half + i);
          store_as(d, hn::NegMulAdd(b, s, hn::Mul(a, c)), out + i);
          store_as(d, hn::MulAdd(a, s, hn::Mul(b, c)), out + half + i);
        });
        std::copy(x + p.rotary_dim, x + p.dim, out + p.rotary_dim);
      }
    }
  });
}

void rope_any(const RopeParams& p, const std::vector<double>& frequencies, void* y) {
  dispatch_dtype(p.dtype, [&](auto t) { rotate(p, frequencies, static_cast<decltype(t)*>(y)); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(rope_any);

namespace {

double frequency(const RopeParams& p, int64_t i) {
  return std::pow(p.theta, -2.0 * i / p.rotary_dim);
}

}  // namespace

void rope(const RopeParams& p, void* y) {
  GDN_CHECK(p.tokens >= 0 && p.heads >= 1 && p.dim >= 1,
            "[rope] heads and dim must be at least 1, got ", p.heads, " and ", p.dim);
  GDN_CHECK(p.rotary_dim >= 0 && p.rotary_dim <= p.dim && p.rotary_dim % 2 == 0,
            "[rope] rotary_dim must be even and at most dim, ", p.dim, ", got ", p.rotary_dim);
  GDN_CHECK(p.theta > 0, "[rope] theta must be positive, got ", p.theta);
  std::vector<double> frequencies;
  for (int64_t i = 0; i < p.rotary_dim / 2; ++i) frequencies.push_back(frequency(p, i));
  HWY_DYNAMIC_DISPATCH(rope_any)(p, frequencies, y);
}

void rope_naive(const RopeParams& p, double* y) {
  const int64_t half = p.rotary_dim / 2;
  for (int64_t row = 0; row < p.tokens * p.heads; ++row) {
    auto x = [&](int64_t i) {
      return dispatch_dtype(p.dtype, [&](auto t) -> double {
        return load(static_cast<const decltype(t)*>(p.x) + p.x_layout.offset(row, p.dim) + i);
      });
    };
    double* out = y + row * p.dim;
    for (int64_t i = 0; i < half; ++i) {
      const double f = p.positions[row / p.heads] * frequency(p, i), c = std::cos(f);
      const double s = p.inverse ? -std::sin(f) : std::sin(f);
      out[i] = x(i) * c - x(i + half) * s;
      out[i + half] = x(i + half) * c + x(i) * s;
    }
    for (int64_t i = p.rotary_dim; i < p.dim; ++i) out[i] = x(i);
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
