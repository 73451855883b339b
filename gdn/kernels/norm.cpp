// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/norm.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "gdn/base/check.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// r = 1 / norm for kRows rows from their sums of squares.
template <int kRows, typename A>
HWY_INLINE void inverse_norms(const NormParams& p, const A* sums_of_squares, A* r) {
  const hn::CappedTag<A, kRows> d;
  const auto count = hn::Set(d, p.kind == NormKind::kRms ? static_cast<A>(p.dim) : A{1});
  const auto eps = hn::Set(d, static_cast<A>(p.eps));
  for (int k = 0; k < kRows; k += static_cast<int>(hn::Lanes(d))) {
    const auto mean = hn::Div(hn::LoadU(d, sums_of_squares + k), count);
    hn::StoreU(hn::Div(hn::Set(d, 1), hn::Sqrt(hn::Add(mean, eps))), d, r + k);
  }
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

// Short rows that are taken together, so that their sums' last steps are taken at once. Backward
// goes over them side by side in its second pass, two at a time also of long rows: the sums of
// dweight are loaded and stored once for all of them. Forward goes over one after the other: it is
// bound by memory, which prefers that.
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
  return sigmoid_and_slope(d, z);
}

// Rows whose first pass is done.
template <typename T, int kRowsOf>
struct ForwardRows {
  static constexpr int kRows = kRowsOf;
  const T* x[kRows];  // or the sum that takes its place
  Acc<T> r[kRows];
};

template <int kRows, typename T>
HWY_INLINE ForwardRows<T, kRows> begin_forward(const NormParams& p, int64_t first, T* sum) {
  using A = Acc<T>;
  const hn::ScalableTag<A> d;
  ForwardRows<T, kRows> rows;
  hn::Vec<decltype(d)> squares[kRows];
  HWY_UNROLL(4)
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = first + k;
    const T* x = row_of<T>(p.x, p.x_layout, row, p.dim);
    if (p.add != nullptr) {
      const T* add = row_of<T>(p.add, p.add_layout, row, p.dim);
      const Output to_sum;
      const OutputRows<T, 1> out = {{&to_sum}, {sum + row * p.dim}};
      const auto make = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
        const auto scale = hn::Set(bundle.d, static_cast<A>(p.add_scale));
        const auto more = bundle.load(add + i);
        auto v = bundle.load(x + i);
        for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::MulAdd(scale, more[j], v[j]);
        return std::array{v};
      };
      map_bundles<T>(0, p.dim, make, out);
      x = out.row[0];
    }
    hn::Vec<decltype(d)> total[1];
    sum_bundles<T>(p.dim, total, [&](auto bundle, int64_t i, auto& sums) HWY_ATTR {
      const auto v = bundle.load(x + i);
      for (int j = 0; j < bundle.kCount; ++j) sums[0][j] = hn::MulAdd(v[j], v[j], sums[0][j]);
    });
    squares[k] = total[0];
    rows.x[k] = x;
  }
  A sums[kRows];
  sums_of_lanes(d, squares, sums);
  inverse_norms<kRows>(p, sums, rows.r);
  return rows;
}

// `weight` in its own order; null: ones.
template <bool kGate, typename Rows, typename T>
HWY_INLINE void finish_forward(const NormParams& p, const Output& to, const Acc<T>* weight,
                               const Rows& rows, int64_t first, int64_t end, T* y) {
  for (int k = 0; k < Rows::kRows; ++k) {
    const int64_t row = first + k, next = row + Rows::kRows;
    const T *x = rows.x[k], *gate = row_of<T>(p.gate, p.gate_layout, row, p.dim);
    const T* next_x = next_row<T>(p.x, p.x_layout, next, end, p.dim);
    const T* next_gate = next_row<T>(p.gate, p.gate_layout, next, end, p.dim);
    const Acc<T> scale = rows.r[k];
    const OutputRows<T, 1> out = {{&to}, {y + row * p.dim}};
    const auto make = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
      const auto d = bundle.d;
      fetch(next_x, i);
      auto v = bundle.load(x + i);
      for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::Mul(v[j], hn::Set(d, scale));
      if (weight != nullptr) {
        const auto w = bundle.load_own(weight + i);
        for (int j = 0; j < bundle.kCount; ++j) v[j] = hn::Mul(v[j], w[j]);
      }
      if constexpr (kGate) {
        fetch(next_gate, i);
        const auto act = bundle.load(gate + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          v[j] =
              hn::Mul(v[j], p.activation == NormGate::kSilu ? silu<kPrecisionOf<T>>(d, act[j])
                                                            : sigmoid<kPrecisionOf<T>>(d, act[j]));
        }
      }
      return std::array{v};
    };
    map_bundles<T>(0, p.dim, make, out);
  }
}

template <typename T>
void forward(const NormParams& p, T* y, T* sum) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int tensors = 2 + (p.gate != nullptr ? 1 : 0) + (p.add != nullptr ? 2 : 0);
  const Output to(tensors * p.rows * row_bytes, y, row_bytes);
  const OwnOrder<T> weight(static_cast<const Acc<T>*>(p.weight), p.dim);
  parallel_for(0, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for_rows(begin, end, p.dim < kLongRow ? kShortRows : 1, [&](auto count, int64_t row) HWY_ATTR {
      const auto rows = begin_forward<count.value>(p, row, sum);
      p.gate != nullptr ? finish_forward<true>(p, to, weight.data(), rows, row, end, y)
                        : finish_forward<false>(p, to, weight.data(), rows, row, end, y);
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
// Both sums are taken in the first pass, for sum(h * n) = r * sum(h * x). `scratch` [kRows, 2, dim]
// takes over what the gate makes of the rows to the second one.
template <typename T, int kRowsOf>
struct BackwardRows {
  static constexpr int kRows = kRowsOf;
  Acc<T> r[kRows], of_x[kRows];
  const Acc<T>* scratch;
};

template <int kRows, bool kGate, typename T>
HWY_INLINE BackwardRows<T, kRows> begin_backward(const BackwardCall<T>& call, int64_t first,
                                                 Acc<T>* scratch) {
  using A = Acc<T>;
  const NormParams& p = call.p;
  const A* weight = call.weight;
  const int64_t dim = p.dim;
  const hn::ScalableTag<A> d;
  BackwardRows<T, kRows> rows;
  rows.scratch = scratch;
  hn::Vec<decltype(d)> squares[kRows], dots[kRows];
  HWY_UNROLL(4)
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = first + k;
    const T* x = row_of<T>(p.x, p.x_layout, row, dim);
    const T* dy = row_of<T>(call.grads.dy, call.grads.dy_layout, row, dim);
    const T* gate = row_of<T>(p.gate, p.gate_layout, row, dim);
    A* gated = kGate ? scratch + 2 * k * dim : nullptr;
    hn::Vec<decltype(d)> totals[2];
    sum_bundles<T>(dim, totals, [&](auto bundle, int64_t i, auto& sums) HWY_ATTR {
      const auto v = bundle.load(x + i);
      auto g = bundle.load(dy + i), weighted = v;
      if (weight != nullptr) {
        const auto w = bundle.load_own(weight + i);
        for (int j = 0; j < bundle.kCount; ++j) weighted[j] = hn::Mul(v[j], w[j]);
      }
      if constexpr (kGate) {
        auto act = bundle.load(gate + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          const auto a = activate(bundle.d, act[j], p.activation);
          act[j] = hn::Mul(hn::Mul(g[j], weighted[j]), a.slope);
          g[j] = hn::Mul(g[j], a.value);
        }
        bundle.store_own(act, gated + dim + i);
        bundle.store_own(g, gated + i);
      }
      for (int j = 0; j < bundle.kCount; ++j) {
        sums[0][j] = hn::MulAdd(v[j], v[j], sums[0][j]);
        sums[1][j] = hn::MulAdd(g[j], weighted[j], sums[1][j]);
      }
    });
    squares[k] = totals[0];
    dots[k] = totals[1];
  }
  A sums[kRows], dot[kRows];
  sums_of_lanes(d, squares, sums);
  sums_of_lanes(d, dots, dot);
  inverse_norms<kRows>(p, sums, rows.r);
  const A mean = p.kind == NormKind::kRms ? A{1} / static_cast<A>(dim) : A{1};
  for (int k = 0; k < kRows; ++k) {
    const A r = rows.r[k];
    rows.of_x[k] = -dot[k] * mean * r * r * r;
  }
  return rows;
}

// `dweight`, in its own order, or null.
template <bool kGate, typename Rows, typename T>
HWY_INLINE void finish_backward(const BackwardCall<T>& call, const Rows& rows, int64_t first,
                                int64_t end, Acc<T>* dweight) {
  using A = Acc<T>;
  constexpr int kRows = Rows::kRows, kOutputs = kGate ? 2 * kRows : kRows;
  const NormParams& p = call.p;
  const NormGrads& grads = call.grads;
  const A* weight = call.weight;
  const int64_t dim = p.dim;
  const T *x[kRows], *dy[kRows], *dsum[kRows];
  const T *next_x[kRows], *next_dy[kRows], *next_gate[kRows];
  A r[kRows], of_x[kRows];  // which no store can change
  OutputRows<T, kOutputs> out;
  HWY_UNROLL(4)
  for (int k = 0; k < kRows; ++k) {
    r[k] = rows.r[k];
    of_x[k] = rows.of_x[k];
    const int64_t row = first + k, next = row + kRows;
    x[k] = row_of<T>(p.x, p.x_layout, row, dim);
    dy[k] = row_of<T>(grads.dy, grads.dy_layout, row, dim);
    dsum[k] = row_of<T>(grads.dsum, grads.dsum_layout, row, dim);
    next_x[k] = next_row<T>(p.x, p.x_layout, next, end, dim);
    next_dy[k] = next_row<T>(grads.dy, grads.dy_layout, next, end, dim);
    next_gate[k] = next_row<T>(p.gate, p.gate_layout, next, end, dim);
    out.to[k] = &call.to;
    out.row[k] = static_cast<T*>(grads.dx) + row * dim;
    if constexpr (kGate) {
      out.to[kRows + k] = &call.to_gate;
      out.row[kRows + k] = static_cast<T*>(grads.dgate) + row * dim;
    }
  }
  const auto make = [&](auto bundle, int64_t i, const auto& emit) GDN_INLINE_ATTR {
    const auto d = bundle.d;
    auto w = bundle.zero(), dw = w;
    if (weight != nullptr) w = bundle.load_own(weight + i);
    if (dweight != nullptr) dw = bundle.load_own(dweight + i);
    HWY_UNROLL(4)
    for (int k = 0; k < kRows; ++k) {
      fetch(next_x[k], i);
      fetch(next_dy[k], i);
      const auto scale = hn::Set(d, r[k]);
      auto v = bundle.load(x[k] + i), g = v;
      if constexpr (kGate) {
        fetch(next_gate[k], i);
        const A* gated = rows.scratch + 2 * k * dim;
        auto slope = bundle.load_own(gated + dim + i);
        for (int j = 0; j < bundle.kCount; ++j) slope[j] = hn::Mul(scale, slope[j]);
        emit(kRows + k, slope);
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
      emit(k, v);
    }
    if (dweight != nullptr) bundle.store_own(dw, dweight + i);
  };
  if constexpr (kOutputs <= 2) {
    const auto make_all = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
      std::array<typename decltype(bundle)::Vectors, kOutputs> results;
      make(bundle, i, [&](int o, const auto& v) GDN_INLINE_ATTR { results[o] = v; });
      return results;
    };
    map_bundles<T>(0, dim, make_all, out);
  } else {  // too many for registers to keep: in memory they would meet loads themselves
    for_bundles<T>(0, dim, [&](auto bundle, int64_t i) HWY_ATTR {
      make(bundle, i, [&](int o, const auto& v) GDN_INLINE_ATTR {
        bundle.store(*out.to[o], v, out.row[o] + i);
      });
    });
  }
}

template <bool kGate, typename T>
void backward_block(const BackwardCall<T>& call, int64_t begin, int64_t end, Acc<T>* scratch,
                    Acc<T>* dweight) {
  for_rows(begin, end, call.p.dim < kLongRow ? kShortRows : 2,
           [&](auto count, int64_t row) HWY_ATTR {
             const auto rows = begin_backward<count.value, kGate>(call, row, scratch);
             finish_backward<kGate>(call, rows, row, end, dweight);
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
      const auto run = p.gate != nullptr ? backward_block<true, T> : backward_block<false, T>;
      run(call, blocks.begin(block), blocks.end(block), scratch.data(), dweight);
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
