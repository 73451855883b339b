// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/norm.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/norm.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "gdn/base/check.h"
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
Acc<T> sum_of_squares(const T* x, int64_t dim) {
  return sum_lanes<Acc<T>>(dim, [&](auto d, int64_t i) HWY_ATTR {
    const auto v = load_as(d, x + i);
    return hn::Mul(v, v);
  });
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
  return dim < kLongRow || row + 1 >= end ? nullptr : row_of<T>(data, layout, row + 1, dim);
}
template <typename T>
HWY_INLINE void fetch(const T* row, int64_t i) {
  if (row != nullptr) __builtin_prefetch(row + i, 0, 2);
}

// act(z) and its derivative, for sigmoid and for z * sigmoid(z).
template <class V>
struct Activation {
  V value, slope;
};
template <class D, class V>
HWY_INLINE Activation<V> activate(D d, V z, bool silu) {
  const auto s = sigmoid(d, z), rest = hn::Sub(hn::Set(d, 1), s);
  if (!silu) return {s, hn::Mul(s, rest)};
  const auto v = hn::Mul(z, s);
  return {v, hn::MulAdd(v, rest, s)};
}

// One row of kVectors whole vectors, which stay in registers; 0: of any length.
template <int kVectors, typename T>
HWY_INLINE void forward_row(const NormParams& p, const Output& to, const T* x, const T* gate,
                            T* out, const T* next_x, const T* next_gate) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const auto finish = [&](auto d, auto v, int64_t i) HWY_ATTR {
    if (weight != nullptr) v = hn::Mul(v, hn::LoadU(d, weight + i));
    if (gate != nullptr) {
      const auto z = load_as(d, gate + i);
      v = hn::Mul(v, p.activation == NormGate::kSilu ? hn::Mul(z, sigmoid(d, z)) : sigmoid(d, z));
    }
    to.store(d, v, out + i);
  };
  if constexpr (kVectors > 0) {
    const hn::ScalableTag<A> d;
    const int64_t n = hn::Lanes(d);
    hn::Vec<decltype(d)> v[kVectors], s0 = hn::Zero(d), s1 = hn::Zero(d);
    for (int j = 0; j < kVectors; ++j) {
      v[j] = load_as(d, x + j * n);
      auto& s = j % 2 == 0 ? s0 : s1;
      s = hn::MulAdd(v[j], v[j], s);
    }
    const A sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
    const auto r = hn::Set(d, inverse_norm(p, sum));
    for (int j = 0; j < kVectors; ++j) finish(d, hn::Mul(v[j], r), j * n);
  } else {
    const A r = inverse_norm(p, sum_of_squares(x, p.dim));
    for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
      fetch(next_x, i);
      fetch(next_gate, i);
      finish(d, hn::Mul(load_as(d, x + i), hn::Set(d, r)), i);
    });
  }
}

// Calls f with the number of vectors in a row as a constant where a row fits into registers, else
// with 0.
template <typename A, class F>
void dispatch_vectors(int64_t dim, const F& f) {
  const int64_t n = hn::Lanes(hn::ScalableTag<A>());
  if (dim == 8 * n) return f(std::integral_constant<int, 8>());
  if (dim == 4 * n) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 0>());
}

template <typename T>
void forward(const NormParams& p, T* y, T* sum) {
  using A = Acc<T>;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int tensors = 2 + (p.gate != nullptr ? 1 : 0) + (p.add != nullptr ? 2 : 0);
  const Output to(tensors * p.rows * row_bytes, y, row_bytes);
  dispatch_vectors<A>(p.add == nullptr ? p.dim : 0, [&](auto vectors) {
    parallel_for(0, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(p.x, p.x_layout, row, p.dim);
        const T* next_x = next_row<T>(p.x, p.x_layout, row, end, p.dim);
        const T* gate = row_of<T>(p.gate, p.gate_layout, row, p.dim);
        const T* next_gate = next_row<T>(p.gate, p.gate_layout, row, end, p.dim);
        if (p.add != nullptr) {
          const T* add = row_of<T>(p.add, p.add_layout, row, p.dim);
          T* total = sum + row * p.dim;
          for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
            const auto scale = hn::Set(d, static_cast<A>(p.add_scale));
            store_as(d, hn::MulAdd(scale, load_as(d, add + i), load_as(d, x + i)), total + i);
          });
          x = total;
        }
        forward_row<vectors.value>(p, to, x, gate, y + row * p.dim, next_x, next_gate);
      }
      to.finish();
    });
  });
}

// The pointers of one row of backward; null for what there is not.
template <typename T>
struct BackwardRow {
  const T *x, *dy, *gate, *dsum, *next_x, *next_dy, *next_gate;
  T *dx, *dgate;
  Acc<T>* dweight;
};

// With n = x * r and h = dy * act(gate) * weight:
//   dx = r * (h - n * m * sum(h * n)), dgate = dy * n * weight * act'(gate), dweight = sum over
//   rows of dy * act * n.
// Both sums are taken in one pass, for sum(h * n) = r * sum(h * x). `scratch` [2, dim] takes over
// what the gate makes of the row to the second pass.
template <bool kGate, typename T>
HWY_INLINE void backward_row(const NormParams& p, const Output& to, const Output& to_gate,
                             const BackwardRow<T>& row, Acc<T>* scratch) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const T *x = row.x, *dy = row.dy;
  A *gated = scratch, *slopes = scratch + p.dim;
  A squares = 0, dot = 0;
  const auto first = [&](auto d, int64_t i, auto& sum_squares, auto& sum_dot) HWY_ATTR {
    const auto v = load_as(d, x + i);
    auto g = load_as(d, dy + i);
    auto weighted = weight != nullptr ? hn::Mul(v, hn::LoadU(d, weight + i)) : v;
    sum_squares = hn::MulAdd(v, v, sum_squares);
    if constexpr (kGate) {
      const auto act = activate(d, load_as(d, row.gate + i), p.activation == NormGate::kSilu);
      hn::StoreU(hn::Mul(hn::Mul(g, weighted), act.slope), d, slopes + i);
      g = hn::Mul(g, act.value);
      hn::StoreU(g, d, gated + i);
    }
    sum_dot = hn::MulAdd(g, weighted, sum_dot);
  };
  {
    const hn::ScalableTag<A> d;
    const int64_t n = hn::Lanes(d);
    auto s0 = hn::Zero(d), s1 = hn::Zero(d), t0 = hn::Zero(d), t1 = hn::Zero(d);
    int64_t i = 0;
    for (; i + 2 * n <= p.dim; i += 2 * n) {
      first(d, i, s0, t0);
      first(d, i + n, s1, t1);
    }
    for (; i + n <= p.dim; i += n) first(d, i, s0, t0);
    const hn::CappedTag<A, 1> d1;
    auto s = hn::Zero(d1), t = hn::Zero(d1);
    for (; i < p.dim; ++i) first(d1, i, s, t);
    squares = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1))) + hn::GetLane(s);
    dot = hn::GetLane(hn::SumOfLanes(d, hn::Add(t0, t1))) + hn::GetLane(t);
  }
  const A r = inverse_norm(p, squares);
  const A mean = p.kind == NormKind::kRms ? dot / static_cast<A>(p.dim) : dot;
  const A of_x = -mean * r * r * r;
  for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
    fetch(row.next_x, i);
    fetch(row.next_dy, i);
    const auto scale = hn::Set(d, r);
    const auto v = load_as(d, x + i);
    auto g = hn::Undefined(d);
    if constexpr (kGate) {
      fetch(row.next_gate, i);
      to_gate.store(d, hn::Mul(scale, hn::LoadU(d, slopes + i)), row.dgate + i);
      g = hn::Mul(scale, hn::LoadU(d, gated + i));
    } else {
      g = hn::Mul(scale, load_as(d, dy + i));
    }
    if (row.dweight != nullptr) {
      hn::StoreU(hn::MulAdd(g, v, hn::LoadU(d, row.dweight + i)), d, row.dweight + i);
    }
    if (weight != nullptr) g = hn::Mul(g, hn::LoadU(d, weight + i));
    auto out = hn::MulAdd(v, hn::Set(d, of_x), g);
    if (row.dsum != nullptr) out = hn::Add(out, load_as(d, row.dsum + i));
    to.store(d, out, row.dx + i);
  });
}

template <typename T>
void backward(const NormParams& p, const NormGrads& grads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.rows, row_grain(p.dim));
  std::vector<A> partial(grads.dweight == nullptr ? 0 : blocks.count() * p.dim);
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int tensors = 3 + (p.gate != nullptr ? 2 : 0) + (grads.dsum != nullptr ? 1 : 0);
  const int64_t bytes = tensors * p.rows * row_bytes;
  const Output to(bytes, grads.dx, row_bytes), to_gate(bytes, grads.dgate, row_bytes);
  parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) HWY_ATTR {
    std::vector<A> scratch(p.gate == nullptr ? 0 : 2 * p.dim);
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = blocks.end(block);
      for (int64_t i = blocks.begin(block); i < end; ++i) {
        const BackwardRow<T> row = {
            row_of<T>(p.x, p.x_layout, i, p.dim),
            row_of<T>(grads.dy, grads.dy_layout, i, p.dim),
            row_of<T>(p.gate, p.gate_layout, i, p.dim),
            row_of<T>(grads.dsum, grads.dsum_layout, i, p.dim),
            next_row<T>(p.x, p.x_layout, i, end, p.dim),
            next_row<T>(grads.dy, grads.dy_layout, i, end, p.dim),
            next_row<T>(p.gate, p.gate_layout, i, end, p.dim),
            static_cast<T*>(grads.dx) + i * p.dim,
            p.gate == nullptr ? nullptr : static_cast<T*>(grads.dgate) + i * p.dim,
            partial.empty() ? nullptr : partial.data() + block * p.dim};
        p.gate == nullptr ? backward_row<false>(p, to, to_gate, row, scratch.data())
                          : backward_row<true>(p, to, to_gate, row, scratch.data());
      }
    }
    to.finish();
    to_gate.finish();
  });
  if (grads.dweight == nullptr) return;
  A* dweight = static_cast<A*>(grads.dweight);
  for (int64_t i = 0; i < p.dim; ++i) {
    A sum = 0;
    for (int64_t block = 0; block < blocks.count(); ++block) sum += partial[block * p.dim + i];
    dweight[i] = sum;
  }
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
