// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cross_entropy.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/cross_entropy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// The largest of many numbers and the sum of exp(x - largest), lane by lane in one pass over them:
// block by block, so that a block comes from L1 when its exponentials are summed.
template <class D>
struct LogSum {
  using A = hn::TFromD<D>;
  using V = hn::Vec<D>;
  static constexpr int64_t kBlock = 1024;

  explicit LogSum(D tag) : d(tag), largest(hn::Set(d, std::numeric_limits<A>::lowest())) {
    for (V& s : sums) s = hn::Zero(d);
  }

  // Takes numbers as long as there are whole bundles, and returns how many.
  template <class Bundle, typename T>
  int64_t add(Bundle bundle, const T* x, int64_t n) {
    constexpr int kAtOnce = 2 / Bundle::kCount;  // two vectors in all
    const int64_t size = bundle.size(), whole = n / size * size;
    for (int64_t begin = 0; begin < whole; begin += kBlock) {
      const int64_t end = std::min(whole, begin + kBlock);
      V most[2] = {largest, largest};
      const auto compare = [&](int64_t i, int u) HWY_ATTR {
        const auto v = bundle.load(x + i);
        for (int j = 0; j < bundle.kCount; ++j) most[u + j] = hn::Max(most[u + j], v[j]);
      };
      int64_t i = begin;
      for (; i + kAtOnce * size <= end; i += kAtOnce * size) {
        for (int u = 0; u < kAtOnce; ++u) compare(i + u * size, u);
      }
      if (i < end) compare(i, 0);
      const V now = hn::Max(most[0], most[1]), scale = exp_of(d, hn::Sub(largest, now));
      for (V& s : sums) s = hn::Mul(s, scale);
      largest = now;
      const auto sum = [&](int64_t i, int u) HWY_ATTR {
        __builtin_prefetch(x + i + kBlock);
        const auto v = bundle.load(x + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          sums[u + j] = hn::Add(sums[u + j], exp_of(d, hn::Sub(v[j], now)));
        }
      };
      i = begin;
      for (; i + kAtOnce * size <= end; i += kAtOnce * size) {
        for (int u = 0; u < kAtOnce; ++u) sum(i + u * size, u);
      }
      if (i < end) sum(i, 0);
    }
    return whole;
  }

  A max() const { return hn::GetLane(hn::MaxOfLanes(d, largest)); }
  // The sum of exp(x - m).
  A sum(A m) const {
    const V scale = exp_of(d, hn::Sub(largest, hn::Set(d, m)));
    return hn::GetLane(hn::SumOfLanes(d, hn::Mul(scale, hn::Add(sums[0], sums[1]))));
  }

  D d;
  V largest, sums[2];
};

template <typename T>
void forward(const CrossEntropyParams& p, Acc<T>* loss, Acc<T>* logsumexp) {
  using A = Acc<T>;
  parallel_for(0, p.rows, row_grain(4 * p.vocab), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.logits) + p.logits_layout.offset(row, p.vocab);
      LogSum all(hn::ScalableTag<A>{});
      LogSum rest(hn::CappedTag<A, 1>{});
      const int64_t done = all.add(WholeBundle<T>(), x, p.vocab);
      rest.add(Bundle<hn::CappedTag<A, 1>, 1>(), x + done, p.vocab - done);
      const A m = std::max(all.max(), rest.max());
      const A log = std::log(all.sum(m) + rest.sum(m));
      logsumexp[row] = m + log;
      const int64_t target = p.targets[row];
      // (m - x[target]) first: it is exact where it matters, m + log may have lost what the loss is
      // made of.
      loss[row] = target == p.ignore_index ? A{0} : (m - load(x + target)) + log;
    }
  });
}

template <typename T>
void backward(const CrossEntropyParams& p, const Acc<T>* logsumexp, const Acc<T>* dloss,
              T* dlogits) {
  using A = Acc<T>;
  const int64_t row_bytes = p.vocab * static_cast<int64_t>(sizeof(T));
  const Output to(2 * p.rows * row_bytes, dlogits, row_bytes);
  parallel_for(0, p.rows, row_grain(4 * p.vocab), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      T* dx = dlogits + row * p.vocab;
      const int64_t target = p.targets[row];
      if (target == p.ignore_index) {
        std::fill(dx, dx + p.vocab, T{});
        continue;
      }
      const T* x = static_cast<const T*>(p.logits) + p.logits_layout.offset(row, p.vocab);
      const A lse = logsumexp[row], scale = dloss[row];
      const A at_target = (std::exp(load(x + target) - lse) - 1) * scale;
      const auto make = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
        const auto d = bundle.d;
        auto v = bundle.load(x + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          v[j] = hn::Mul(exp_of(d, hn::Sub(v[j], hn::Set(d, lse))), hn::Set(d, scale));
        }
        return std::array{v};
      };
      map_bundles<T>(0, p.vocab, make, OutputRows<T, 1>{{&to}, {dx}});
      store(dx + target, at_target);
    }
    to.finish();
  });
}

void cross_entropy_forward_any(const CrossEntropyParams& p, void* loss, void* logsumexp) {
  dispatch_storage(p.dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    forward<decltype(t)>(p, static_cast<A*>(loss), static_cast<A*>(logsumexp));
  });
}

void cross_entropy_backward_any(const CrossEntropyParams& p, const void* logsumexp,
                                const void* dloss, void* dlogits) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    backward<T>(p, static_cast<const A*>(logsumexp), static_cast<const A*>(dloss),
                static_cast<T*>(dlogits));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(cross_entropy_forward_any);
HWY_EXPORT(cross_entropy_backward_any);

namespace {

void check(const CrossEntropyParams& p) {
  GDN_CHECK(p.rows >= 0 && p.vocab >= 1,
            "[cross_entropy] the vocabulary must have at least 1 entry, got ", p.vocab);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t target = p.targets[row];
    GDN_CHECK((target >= 0 && target < p.vocab) || target == p.ignore_index,
              "[cross_entropy] targets must be in [0, ", p.vocab, ") or ignore_index (",
              p.ignore_index, "), got ", target, " in row ", row);
  }
}

double at(const CrossEntropyParams& p, int64_t row, int64_t i) {
  return dispatch_dtype(p.dtype, [&](auto t) -> double {
    return load(static_cast<const decltype(t)*>(p.logits) + p.logits_layout.offset(row, p.vocab) +
                i);
  });
}

double naive_logsumexp(const CrossEntropyParams& p, int64_t row) {
  double m = at(p, row, 0), sum = 0;
  for (int64_t i = 1; i < p.vocab; ++i) m = std::max(m, at(p, row, i));
  for (int64_t i = 0; i < p.vocab; ++i) sum += std::exp(at(p, row, i) - m);
  return m + std::log(sum);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p, void* loss, void* logsumexp) {
  check(p);
  HWY_DYNAMIC_DISPATCH(cross_entropy_forward_any)(p, loss, logsumexp);
}

void cross_entropy_backward(const CrossEntropyParams& p, const void* logsumexp, const void* dloss,
                            void* dlogits) {
  check(p);
  HWY_DYNAMIC_DISPATCH(cross_entropy_backward_any)(p, logsumexp, dloss, dlogits);
}

void cross_entropy_naive_forward(const CrossEntropyParams& p, double* loss, double* logsumexp) {
  for (int64_t row = 0; row < p.rows; ++row) {
    logsumexp[row] = naive_logsumexp(p, row);
    loss[row] = p.targets[row] == p.ignore_index ? 0 : logsumexp[row] - at(p, row, p.targets[row]);
  }
}

void cross_entropy_naive_backward(const CrossEntropyParams& p, const double* dloss,
                                  double* dlogits) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const double lse = naive_logsumexp(p, row);
    for (int64_t i = 0; i < p.vocab; ++i) {
      const double softmax = std::exp(at(p, row, i) - lse);
      dlogits[row * p.vocab + i] = p.targets[row] == p.ignore_index
                                       ? 0
                                       : (softmax - (i == p.targets[row] ? 1 : 0)) * dloss[row];
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
