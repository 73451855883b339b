// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/norm.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/norm.h"

#include <cmath>
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
void forward(const NormParams& p, T* y, T* sum) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  parallel_for(0, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row, p.dim);
      const T* gate = p.gate == nullptr
                          ? nullptr
                          : static_cast<const T*>(p.gate) + p.gate_layout.offset(row, p.dim);
      T* out = y + row * p.dim;
      if (p.add != nullptr) {
        const T* add = static_cast<const T*>(p.add) + p.add_layout.offset(row, p.dim);
        T* total = sum + row * p.dim;
        for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
          const auto scale = hn::Set(d, static_cast<A>(p.add_scale));
          store_as(d, hn::MulAdd(scale, load_as(d, add + i), load_as(d, x + i)), total + i);
        });
        x = total;
      }
      const A r = inverse_norm(p, sum_of_squares(x, p.dim));
      for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
        auto v = hn::Mul(load_as(d, x + i), hn::Set(d, r));
        if (weight != nullptr) v = hn::Mul(v, hn::LoadU(d, weight + i));
        if (gate != nullptr) {
          const auto z = load_as(d, gate + i);
          const auto s = sigmoid(d, z);
          v = hn::Mul(v, p.activation == NormGate::kSilu ? hn::Mul(z, s) : s);
        }
        store_as(d, v, out + i);
      });
    }
  });
}

// With n = x * r and h = dy * act(gate) * weight:
//   dx = r * (h - n * m * sum(h * n)), dgate = dy * n * weight * act'(gate), dweight = sum over
//   rows of dy * act * n.
template <typename T>
void backward(const NormParams& p, const NormGrads& grads) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const RowBlocks blocks(p.rows, row_grain(p.dim));
  std::vector<A> partial(grads.dweight == nullptr ? 0 : blocks.count() * p.dim);
  parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) HWY_ATTR {
    std::vector<A> scratch(p.dim);
    A* h = scratch.data();
    for (int64_t block = first; block < last; ++block) {
      A* dweight = partial.empty() ? nullptr : partial.data() + block * p.dim;
      for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
        const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row, p.dim);
        const T* dy = static_cast<const T*>(grads.dy) + grads.dy_layout.offset(row, p.dim);
        const T* gate = p.gate == nullptr
                            ? nullptr
                            : static_cast<const T*>(p.gate) + p.gate_layout.offset(row, p.dim);
        T* dgate = gate == nullptr ? nullptr : static_cast<T*>(grads.dgate) + row * p.dim;
        T* dx = static_cast<T*>(grads.dx) + row * p.dim;
        const T* dsum = grads.dsum == nullptr ? nullptr
                                              : static_cast<const T*>(grads.dsum) +
                                                    grads.dsum_layout.offset(row, p.dim);
        const A r = inverse_norm(p, sum_of_squares(x, p.dim));
        const A dot = sum_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
          const auto n = hn::Mul(load_as(d, x + i), hn::Set(d, r));
          auto g = load_as(d, dy + i);
          if (gate != nullptr) {
            const auto z = load_as(d, gate + i);
            const auto s = sigmoid(d, z);
            const auto one = hn::Set(d, 1);
            const auto ds = hn::Mul(s, hn::Sub(one, s));
            const bool silu = p.activation == NormGate::kSilu;
            auto dz = hn::Mul(hn::Mul(g, n), silu ? hn::MulAdd(z, ds, s) : ds);
            if (weight != nullptr) dz = hn::Mul(dz, hn::LoadU(d, weight + i));
            store_as(d, dz, dgate + i);
            g = hn::Mul(g, silu ? hn::Mul(z, s) : s);
          }
          if (dweight != nullptr) {
            hn::StoreU(hn::MulAdd(g, n, hn::LoadU(d, dweight + i)), d, dweight + i);
          }
          if (weight != nullptr) g = hn::Mul(g, hn::LoadU(d, weight + i));
          hn::StoreU(g, d, h + i);
          return hn::Mul(g, n);
        });
        const A mean = p.kind == NormKind::kRms ? dot / static_cast<A>(p.dim) : dot;
        for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
          const auto n = hn::Mul(load_as(d, x + i), hn::Set(d, r));
          auto v = hn::NegMulAdd(n, hn::Set(d, mean), hn::LoadU(d, h + i));
          v = hn::Mul(v, hn::Set(d, r));
          if (dsum != nullptr) v = hn::Add(v, load_as(d, dsum + i));
          store_as(d, v, dx + i);
        });
      }
    }
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
  dispatch_dtype(p.dtype, [&](auto t) {
    forward(p, static_cast<decltype(t)*>(y), static_cast<decltype(t)*>(sum));
  });
}

void norm_backward_any(const NormParams& p, const NormGrads& grads) {
  dispatch_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p, grads); });
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
