// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/matvec.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/matvec.h"

#include <algorithm>
#include <cstring>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd-inl.h"

#ifndef GDN_MATVEC_ONCE  // what does not depend on the SIMD target
#define GDN_MATVEC_ONCE
namespace gdn::matvec_detail {

// Outputs per block: their sums are added up together.
inline constexpr int64_t kBlock = 4;
// Weights per task of a thread: what is worth waking one for.
inline constexpr int64_t kTaskWeights = 32768;

inline int64_t blocks(const MatvecWeight& w) { return (w.out + kBlock - 1) / kBlock; }

}  // namespace gdn::matvec_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// sums[o] = weight row o . x for kOut rows that lie `in` apart. One row after the other, in the
// order in which they lie in memory: of several streams within one page the prefetchers lose
// track, and weights come from memory at a quarter of the rate.
template <int kOut>
HWY_INLINE void dot_rows(const float* weight, const float* x, int64_t in, float* sums) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = hn::Lanes(d), whole = in - in % lanes;
  hn::Vec<decltype(d)> total[kOut];
  for (int o = 0; o < kOut; ++o) {
    const float* w = weight + o * in;
    const auto product = [&](int64_t i, auto sum) HWY_ATTR {
      return hn::MulAdd(hn::LoadU(d, w + i), hn::LoadU(d, x + i), sum);
    };
    auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * lanes <= in; i += 4 * lanes) {
      s0 = product(i, s0);
      s1 = product(i + lanes, s1);
      s2 = product(i + 2 * lanes, s2);
      s3 = product(i + 3 * lanes, s3);
    }
    for (; i < whole; i += lanes) s0 = product(i, s0);
    total[o] = hn::Add(hn::Add(s0, s1), hn::Add(s2, s3));
  }
  sums_of_lanes(d, total, sums);
  for (int o = 0; o < kOut; ++o) {
    for (int64_t j = whole; j < in; ++j) sums[o] += weight[o * in + j] * x[j];
  }
}

// Two bf16 to each lane of 32 bits.
template <class D>
HWY_INLINE hn::Vec<D> load_pairs(D du, const BFloat16* p) {
#if HWY_TARGET == HWY_SCALAR
  uint32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return hn::Set(du, pair);
#else
  return hn::BitCast(du, hn::LoadU(hn::Repartition<uint16_t, D>(), &p->bits));
#endif
}

// The same for bf16 weights. Two of them fill a lane of 32 bits, so x comes with the elements of
// even index in front of those of odd index.
template <int kOut>
HWY_INLINE void dot_rows(const BFloat16* weight, const float* x, int64_t in, float* sums) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const int64_t lanes = hn::Lanes(d), half = in / 2, whole = half - half % lanes;
  hn::Vec<decltype(d)> total[kOut];
  for (int o = 0; o < kOut; ++o) {
    const BFloat16* w = weight + o * in;
    const auto products = [&](int64_t i, auto& even, auto& odd) HWY_ATTR {
      const auto pair = load_pairs(du, w + 2 * i);
      even = hn::MulAdd(hn::BitCast(d, hn::ShiftLeft<16>(pair)), hn::LoadU(d, x + i), even);
      odd = hn::MulAdd(hn::BitCast(d, hn::And(pair, hn::Set(du, 0xffff0000u))),
                       hn::LoadU(d, x + half + i), odd);
    };
    auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 2 * lanes <= half; i += 2 * lanes) {
      products(i, s0, s1);
      products(i + lanes, s2, s3);
    }
    for (; i < whole; i += lanes) products(i, s0, s1);
    total[o] = hn::Add(hn::Add(s0, s1), hn::Add(s2, s3));
  }
  sums_of_lanes(d, total, sums);
  for (int o = 0; o < kOut; ++o) {
    for (int64_t j = whole; j < half; ++j) {
      sums[o] += to_float(weight[o * in + 2 * j]) * x[j];
      sums[o] += to_float(weight[o * in + 2 * j + 1]) * x[half + j];
    }
    if (in % 2 == 1) sums[o] += to_float(weight[o * in + in - 1]) * x[in - 1];
  }
}

template <typename T>
void matvec_t(const MatvecParams& p) {
  using matvec_detail::blocks;
  using matvec_detail::kBlock;
  const float* x = static_cast<const float*>(p.x);
  int64_t x_stride = p.x_stride;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // As the inner loop wants it, aligned.
    float* widened = reinterpret_cast<float*>(
        thread_scratch(static_cast<size_t>(p.rows * p.in) * sizeof(float)));
    for (int64_t row = 0; row < p.rows; ++row) {
      const BFloat16* from = static_cast<const BFloat16*>(p.x) + row * p.x_stride;
      float* to = widened + row * p.in;
      const int64_t half = p.in / 2;
      for (int64_t i = 0; i < half; ++i) {
        to[i] = to_float(from[2 * i]);
        to[half + i] = to_float(from[2 * i + 1]);
      }
      if (p.in % 2 == 1) to[p.in - 1] = to_float(from[p.in - 1]);
    }
    x = widened;
    x_stride = p.in;
  }
  int64_t total = 0;
  for (const MatvecWeight& w : p.weights) total += blocks(w);
  const int64_t grain = std::max<int64_t>(
      1, matvec_detail::kTaskWeights / std::max<int64_t>(1, kBlock * p.in * p.rows));
  parallel_for(0, total, grain, [&, x, x_stride](int64_t begin, int64_t end) HWY_ATTR {
    size_t which = 0;
    int64_t first = 0;  // block of all weights that weights[which] begins with
    for (int64_t block = begin; block < end; ++block) {
      while (block - first >= blocks(p.weights[which])) first += blocks(p.weights[which++]);
      const MatvecWeight& w = p.weights[which];
      const int64_t out = (block - first) * kBlock, count = std::min(kBlock, w.out - out);
      const T* weight = static_cast<const T*>(w.weight) + out * p.in;
      for (int64_t row = 0; row < p.rows; ++row) {
        float sums[kBlock];
        if (count == kBlock) {
          dot_rows<kBlock>(weight, x + row * x_stride, p.in, sums);
        } else {
          for (int64_t o = 0; o < count; ++o) {
            dot_rows<1>(weight + o * p.in, x + row * x_stride, p.in, sums + o);
          }
        }
        T* y = static_cast<T*>(w.y) + row * w.y_stride + out;
        for (int64_t o = 0; o < count; ++o) {
          const float bias =
              w.bias == nullptr ? 0.0f : load(static_cast<const T*>(w.bias) + out + o);
          store(y + o, sums[o] + bias);
        }
      }
    }
  });
}

void matvec_any(const MatvecParams& p) {
  p.dtype == DType::kBF16 ? matvec_t<BFloat16>(p) : matvec_t<float>(p);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(matvec_any);

void matvec(const MatvecParams& p) {
  GDN_CHECK(p.dtype == DType::kF32 || p.dtype == DType::kBF16,
            "[matvec] the dtype must be float32 or bfloat16");
  GDN_CHECK(p.rows >= 0, "[matvec] rows must be at least 0, got ", p.rows);
  GDN_CHECK(p.in >= 1, "[matvec] in must be at least 1, got ", p.in);
  for (const MatvecWeight& w : p.weights) {
    GDN_CHECK(w.out >= 0, "[matvec] out must be at least 0, got ", w.out);
  }
  if (p.rows == 0) return;
  HWY_DYNAMIC_DISPATCH(matvec_any)(p);
}

void matvec_naive(const MatvecParams& p, std::span<double* const> y) {
  const auto at = [&](const void* data, int64_t i) {
    return p.dtype == DType::kBF16
               ? static_cast<double>(load(static_cast<const BFloat16*>(data) + i))
               : static_cast<double>(static_cast<const float*>(data)[i]);
  };
  for (size_t n = 0; n < p.weights.size(); ++n) {
    const MatvecWeight& w = p.weights[n];
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t o = 0; o < w.out; ++o) {
        double sum = w.bias == nullptr ? 0 : at(w.bias, o);
        for (int64_t i = 0; i < p.in; ++i) {
          sum += at(w.weight, o * p.in + i) * at(p.x, row * p.x_stride + i);
        }
        y[n][row * w.out + o] = sum;
      }
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
