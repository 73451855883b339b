// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/norm.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "gdn/base/check.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

template <typename A>
A inverse_norm(const NormParams& p, A sum_of_squares) {
  const A mean = p.kind == NormKind::kRms ? sum_of_squares / static_cast<A>(p.dim) : sum_of_squares;
  return A{1} / std::sqrt(mean + static_cast<A>(p.eps));
}

template <typename T>
HWY_INLINE Acc<T> sum_of_squares(const T* x, int64_t dim) {
  return sum_bundles<T, 1>(dim, [&](auto bundle, int64_t i, auto& sums) HWY_ATTR {
    const auto v = bundle.load(x + i);
    for (int j = 0; j < bundle.kCount; ++j) sums[0][j] = hn::MulAdd(v[j], v[j], sums[0][j]);
  })[0];
}

template <typename T>
const T* row_of(const void* data, const RowLayout& layout, int64_t row, int64_t dim) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + layout.offset(row, dim);
}

// While a long row is written, the reads of the next one would stop: they are asked for ahead.
// Short rows are in flight several at a time anyway.
inline constexpr int64_t kLongRow = 512;
template <typename T>
const T* next_row(const void* data, const RowLayout& layout, int64_t row, int64_t end,
                  int64_t dim) {
  return dim < kLongRow || row >= end ? nullptr : row_of<T>(data, layout, row, dim);
}
template <typename T>
HWY_INLINE void fetch(const T* row, int64_t i) {
  if (row != nullptr) __builtin_prefetch(row + i, 0, 2);
}

// Short rows that are taken together, so that the second pass waits only once for what the sums'
// last steps and the square roots take. Backward goes over them side by side in its second pass,
// two at a time also of long rows: the sums of dweight are loaded and stored once for all of them.
// Forward goes over one after the other: it is bound by memory, which prefers that.
inline constexpr int kShortRows = 4;

// Calls f(std::integral_constant<int, kRows>(), row) for all rows: `together` of them at a time
// (1, 2 or kShortRows), and the rest one by one.
template <class F>
HWY_INLINE void for_rows(int64_t begin, int64_t end, int together, const F& f) {
  int64_t row = begin;
  if (together == kShortRows) {
    for (; row + kShortRows <= end; row += kShortRows) {
      f(std::integral_constant<int, kShortRows>(), row);
    }
  } else if (together == 2) {
    for (; row + 2 <= end; row += 2) f(std::integral_constant<int, 2>(), row);
  }
  for (; row < end; ++row) f(std::integral_constant<int, 1>(), row);
}

template <class D, class V>
HWY_INLINE Activation<V> activate(D d, V z, NormGate activation) {
  if (activation == NormGate::kSilu) return silu_and_slope(d, z);
  const auto s = sigmoid(d, z);
  return {s, hn::Mul(s, hn::Sub(hn::Set(d, 1), s))};
}

// `weight` in its own order; null: ones.
template <bool kGate, int kRows, typename T>
HWY_INLINE void forward_rows(const NormParams& p, const Output& to, const Acc<T>* weight,
                             int64_t first, int64_t end, T* y, T* sum) {
  using A = Acc<T>;
  const T *x[kRows], *gate[kRows], *next_x[kRows], *next_gate[kRows];
  A r[kRows];
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = first + k;
    x[k] = row_of<T>(p.x, p.x_layout, row, p.dim);
    gate[k] = row_of<T>(p.gate, p.gate_layout, row, p.dim);
    next_x[k] = next_row<T>(p.x, p.x_layout, row + kRows, end, p.dim);
    next_gate[k] = next_row<T>(p.gate, p.gate_layout, row + kRows, end, p.dim);
    if (p.add != nullptr) {
      const T *add = row_of<T>(p.add, p.add_layout, row, p.dim), *in = x[k];
      T* total = sum + row * p.dim;
      for_bundles<T>(0, p.dim, [&](auto bundle, int64_t i) HWY_ATTR {
        const auto scale = hn::Set(bundle.d, static_cast<A>(p.add_scale));
        const auto more = bundle.load(add + i);
        auto v = bundle.load(in + i);
        for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::MulAdd(scale, more[j], v[j]);
        bundle.store(Output(), v, total + i);
      });
      x[k] = total;
    }
    r[k] = inverse_norm(p, sum_of_squares(x[k], p.dim));
  }
  for (int k = 0; k < kRows; ++k) {
    const T *in = x[k], *z = gate[k], *fetch_x = next_x[k], *fetch_gate = next_gate[k];
    T* out = y + (first + k) * p.dim;
    const A scale = r[k];
    for_bundles<T>(0, p.dim, [&](auto bundle, int64_t i) HWY_ATTR {
      const auto d = bundle.d;
      fetch(fetch_x, i);
      auto v = bundle.load(in + i);
      for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::Mul(v[j], hn::Set(d, scale));
      if (weight != nullptr) {
        const auto w = bundle.load_own(weight + i);
        for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::Mul(v[j], w[j]);
      }
      if constexpr (kGate) {
        fetch(fetch_gate, i);
        const auto act = bundle.load(z + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          v[j] =
              hn::Mul(v[j], p.activation == NormGate::kSilu ? silu(d, act[j]) : sigmoid(d, act[j]));
        }
      }
      bundle.store(to, v, out + i);
    });
  }
}

template <typename T>
void forward(const NormParams& p, T* y, T* sum) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int tensors = 2 + (p.gate != nullptr ? 1 : 0) + (p.add != nullptr ? 2 : 0);
  const Output to(tensors * p.rows * row_bytes, y, row_bytes);
  const OwnOrder<T> weight(static_cast<const Acc<T>*>(p.weight), p.dim);
  parallel_for(0, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for_rows(begin, end, p.dim < kLongRow ? kShortRows : 1, [&](auto rows, int64_t row) HWY_ATTR {
      p.gate != nullptr ? forward_rows<true, rows.value>(p, to, weight.data(), row, end, y, sum)
                        : forward_rows<false, rows.value>(p, to, weight.data(), row, end, y, sum);
    });
    to.finish();
  });
}

// What the blocks of backward share.
template <typename T>
struct BackwardCall {
  const NormParams& p;
  const NormGrads& grads;
  const Acc<T>* weight;  // in its own order; null: ones
  Output to, to_gate;
};

// With n = x * r and h = dy * act(gate) * weight:
//   dx = r * (h - n * m * sum(h * n)), dgate = dy * n * weight * act'(gate), dweight = sum over
//   rows of dy * act * n.
// Both sums are taken in one pass, for sum(h * n) = r * sum(h * x). `scratch` [kRows, 2, dim] takes
// over what the gate makes of the rows to the second pass. `dweight`, in its own order, or null.
template <bool kGate, int kRows, typename T>
HWY_INLINE void backward_rows(const BackwardCall<T>& call, int64_t first_row, int64_t end,
                              Acc<T>* scratch, Acc<T>* dweight) {
  using A = Acc<T>;
  const NormParams& p = call.p;
  const NormGrads& grads = call.grads;
  const A* weight = call.weight;
  const int64_t dim = p.dim;
  const T *x[kRows], *dy[kRows], *gate[kRows], *dsum[kRows];
  const T *next_x[kRows], *next_dy[kRows], *next_gate[kRows];
  A r[kRows], of_x[kRows];
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = first_row + k, next = row + kRows;
    x[k] = row_of<T>(p.x, p.x_layout, row, dim);
    dy[k] = row_of<T>(grads.dy, grads.dy_layout, row, dim);
    gate[k] = row_of<T>(p.gate, p.gate_layout, row, dim);
    dsum[k] = row_of<T>(grads.dsum, grads.dsum_layout, row, dim);
    next_x[k] = next_row<T>(p.x, p.x_layout, next, end, dim);
    next_dy[k] = next_row<T>(grads.dy, grads.dy_layout, next, end, dim);
    next_gate[k] = next_row<T>(p.gate, p.gate_layout, next, end, dim);
    A *gated = scratch + 2 * k * dim, *slopes = gated + dim;
    const T *in = x[k], *gradient = dy[k], *z = gate[k];
    const auto [squares, dot] =
        sum_bundles<T, 2>(dim, [&](auto bundle, int64_t i, auto& sums) HWY_ATTR {
          const auto v = bundle.load(in + i);
          auto g = bundle.load(gradient + i), weighted = v;
          if (weight != nullptr) {
            const auto w = bundle.load_own(weight + i);
            for (int j = 0; j < bundle.kCount; ++j) weighted[j] = hn::Mul(v[j], w[j]);
          }
          if constexpr (kGate) {
            auto act = bundle.load(z + i);
            for (int j = 0; j < bundle.kCount; ++j) {
              const auto a = activate(bundle.d, act[j], p.activation);
              act[j] = hn::Mul(hn::Mul(g[j], weighted[j]), a.slope);
              g[j] = hn::Mul(g[j], a.value);
            }
            bundle.store_own(act, slopes + i);
            bundle.store_own(g, gated + i);
          }
          for (int j = 0; j < bundle.kCount; ++j) {
            sums[0][j] = hn::MulAdd(v[j], v[j], sums[0][j]);
            sums[1][j] = hn::MulAdd(g[j], weighted[j], sums[1][j]);
          }
        });
    r[k] = inverse_norm(p, squares);
    of_x[k] = -(p.kind == NormKind::kRms ? dot / static_cast<A>(dim) : dot) * r[k] * r[k] * r[k];
  }
  T* dx = static_cast<T*>(grads.dx) + first_row * dim;
  T* dgate = kGate ? static_cast<T*>(grads.dgate) + first_row * dim : nullptr;
  for_bundles<T>(0, dim, [&](auto bundle, int64_t i) HWY_ATTR {
    const auto d = bundle.d;
    auto w = bundle.zero(), dw = w;
    if (weight != nullptr) w = bundle.load_own(weight + i);
    if (dweight != nullptr) dw = bundle.load_own(dweight + i);
    for (int k = 0; k < kRows; ++k) {
      fetch(next_x[k], i);
      fetch(next_dy[k], i);
      const auto scale = hn::Set(d, r[k]);
      auto v = bundle.load(x[k] + i), g = v;
      if constexpr (kGate) {
        fetch(next_gate[k], i);
        const A* gated = scratch + 2 * k * dim;
        auto slope = bundle.load_own(gated + dim + i);
        for (int j = 0; j < bundle.kCount; ++j) slope[j] = hn::Mul(scale, slope[j]);
        bundle.store(call.to_gate, slope, dgate + k * dim + i);
        g = bundle.load_own(gated + i);
      } else {
        g = bundle.load(dy[k] + i);
      }
      for (int j = 0; j < bundle.kCount; ++j) {
        g[j] = hn::Mul(scale, g[j]);
        dw[j] = hn::MulAdd(g[j], v[j], dw[j]);
        if (weight != nullptr) g[j] = hn::Mul(g[j], w[j]);
        v[j] = hn::MulAdd(v[j], hn::Set(d, of_x[k]), g[j]);
      }
      if (dsum[k] != nullptr) {
        const auto more = bundle.load(dsum[k] + i);
        for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::Add(v[j], more[j]);
      }
      bundle.store(call.to, v, dx + k * dim + i);
    }
    if (dweight != nullptr) bundle.store_own(dw, dweight + i);
  });
}

template <typename T>
void backward(const NormParams& p, const NormGrads& grads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.rows, row_grain(p.dim));
  PageVector<A> partial(grads.dweight == nullptr ? 0 : blocks.count() * p.dim);
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int tensors = 3 + (p.gate != nullptr ? 2 : 0) + (grads.dsum != nullptr ? 1 : 0);
  const int64_t bytes = tensors * p.rows * row_bytes;
  const OwnOrder<T> weight(static_cast<const A*>(p.weight), p.dim);
  const BackwardCall<T> call = {p, grads, weight.data(), Output(bytes, grads.dx, row_bytes),
                                Output(bytes, grads.dgate, row_bytes)};
  parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) HWY_ATTR {
    PageVector<A> scratch(p.gate == nullptr ? 0 : 2 * kShortRows * p.dim);
    for (int64_t block = first; block < last; ++block) {
      A* dweight = partial.empty() ? nullptr : partial.data() + block * p.dim;
      const int64_t end = blocks.end(block);
      for_rows(blocks.begin(block), end, p.dim < kLongRow ? kShortRows : 2,
               [&](auto rows, int64_t row) HWY_ATTR {
                 p.gate != nullptr
                     ? backward_rows<true, rows.value>(call, row, end, scratch.data(), dweight)
                     : backward_rows<false, rows.value>(call, row, end, scratch.data(), dweight);
               });
    }
    call.to.finish();
    call.to_gate.finish();
  });
  if (grads.dweight == nullptr) return;
  A* dweight = static_cast<A*>(grads.dweight);
  add_rows_up(partial.data(), blocks.count(), p.dim);
  for_bundles<T>(0, p.dim, [&](auto bundle, int64_t i) HWY_ATTR {
    bundle.store(Output(), bundle.load_own(partial.data() + i), dweight + i);
  });
}

void norm_forward_any(const NormParams& p, void* y, void* sum) {
  dispatch_storage(p.dtype, [&](auto t) {
    forward(p, static_cast<decltype(t)*>(y), static_cast<decltype(t)*>(sum));
  });
}

void norm_backward_any(const NormParams& p, const NormGrads& grads) {
  dispatch_storage(p.dtype, [&](auto t) { backward<decltype(t)>(p, grads); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(norm_forward_any);
HWY_EXPORT(norm_backward_any);

namespace {

void check(const NormParams& p) {
  GDN_CHECK(p.rows >= 0 && p.dim >= 1, "[norm] rows must be >= 0 and dim >= 1, got ", p.rows,
            " and ", p.dim);
  GDN_CHECK(p.eps >= 0, "[norm] eps must not be negative, got ", p.eps);
}

double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

// Element (row, i) of a tensor of p.dtype, or `otherwise` where the tensor is absent.
double read(const NormParams& p, const void* data, const RowLayout& layout, int64_t row, int64_t i,
            double otherwise) {
  if (data == nullptr) return otherwise;
  return dispatch_dtype(p.dtype, [&](auto t) -> double {
    return load(static_cast<const decltype(t)*>(data) + layout.offset(row, p.dim) + i);
  });
}

double weight_at(const NormParams& p, int64_t i) {
  if (p.weight == nullptr) return 1.0;
  return p.dtype == DType::kF64 ? static_cast<const double*>(p.weight)[i]
                                : static_cast<const float*>(p.weight)[i];
}

double naive_inverse_norm(const NormParams& p, int64_t row) {
  double sum = 0;
  for (int64_t i = 0; i < p.dim; ++i) {
    const double x = read(p, p.x, p.x_layout, row, i, 0);
    sum += x * x;
  }
  return 1.0 / std::sqrt((p.kind == NormKind::kRms ? sum / p.dim : sum) + p.eps);
}

}  // namespace

void norm_forward(const NormParams& p, void* y, void* sum) {
  check(p);
  GDN_CHECK((p.add == nullptr) == (sum == nullptr), "[norm] add and sum go together");
  HWY_DYNAMIC_DISPATCH(norm_forward_any)(p, y, sum);
}

void norm_backward(const NormParams& p, const NormGrads& grads) {
  check(p);
  GDN_CHECK(p.add == nullptr, "[norm] backward takes the sum as x, and no add");
  HWY_DYNAMIC_DISPATCH(norm_backward_any)(p, grads);
}

void norm_naive_forward(const NormParams& p, double* y) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const double r = naive_inverse_norm(p, row);
    for (int64_t i = 0; i < p.dim; ++i) {
      double act = 1;
      if (p.gate != nullptr) {
        const double z = read(p, p.gate, p.gate_layout, row, i, 0);
        act = sigmoid(z) * (p.activation == NormGate::kSilu ? z : 1);
      }
      y[row * p.dim + i] = read(p, p.x, p.x_layout, row, i, 0) * r * weight_at(p, i) * act;
    }
  }
}

void norm_naive_backward(const NormParams& p, const double* dy, double* dx, double* dgate,
                         double* dweight) {
  if (dweight != nullptr) std::fill(dweight, dweight + p.dim, 0.0);
  for (int64_t row = 0; row < p.rows; ++row) {
    const double r = naive_inverse_norm(p, row);
    double dr = 0;  // the loss's derivative by r
    for (int64_t i = 0; i < p.dim; ++i) {
      const double x = read(p, p.x, p.x_layout, row, i, 0), w = weight_at(p, i),
                   g = dy[row * p.dim + i];
      double act = 1;
      if (p.gate != nullptr) {
        const double z = read(p, p.gate, p.gate_layout, row, i, 0), s = sigmoid(z);
        const bool silu = p.activation == NormGate::kSilu;
        act = silu ? z * s : s;
        dgate[row * p.dim + i] = g * x * r * w * (silu ? s * (1 + z * (1 - s)) : s * (1 - s));
      }
      if (dweight != nullptr) dweight[i] += g * x * r * act;
      dx[row * p.dim + i] = g * r * w * act;
      dr += g * x * w * act;
    }
    const double count = p.kind == NormKind::kRms ? p.dim : 1;
    for (int64_t i = 0; i < p.dim; ++i) {
      dx[row * p.dim + i] -= dr * r * r * r * read(p, p.x, p.x_layout, row, i, 0) / count;
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
