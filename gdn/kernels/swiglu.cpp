// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/swiglu.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/swiglu.h"

#include <array>
#include <cmath>

#include "gdn/base/check.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

template <typename T>
void forward(const SwigluParams& p, T* y) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const Output to(3 * p.rows * row_bytes, y, row_bytes);
  parallel_for(0, p.rows, row_grain(4 * p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(p.gate) + p.gate_layout.offset(row, p.dim);
      const T* up = static_cast<const T*>(p.up) + p.up_layout.offset(row, p.dim);
      const auto make = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
        const auto z = bundle.load(gate + i);
        auto out = bundle.load(up + i);
        for (int j = 0; j < bundle.kCount; ++j)
          out[j] = hn::Mul(silu<kPrecisionOf<T>>(bundle.d, z[j]), out[j]);
        return std::array{out};
      };
      map_bundles<T>(0, p.dim, make, OutputRows<T, 1>{{&to}, {y + row * p.dim}});
    }
    to.finish();
  });
}

template <typename T>
void backward(const SwigluParams& p, const T* dy, T* dgate, T* dup) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T)), bytes = 5 * p.rows * row_bytes;
  const Output to_gate(bytes, dgate, row_bytes), to_up(bytes, dup, row_bytes);
  parallel_for(0, p.rows, row_grain(4 * p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(p.gate) + p.gate_layout.offset(row, p.dim);
      const T* up = static_cast<const T*>(p.up) + p.up_layout.offset(row, p.dim);
      const int64_t out = row * p.dim;
      const auto make = [&](auto bundle, int64_t i) GDN_INLINE_ATTR {
        const auto g = bundle.load(dy + out + i);
        auto z = bundle.load(gate + i), u = bundle.load(up + i);
        for (int j = 0; j < bundle.kCount; ++j) {
          const auto act = silu_and_slope<kPrecisionOf<T>>(bundle.d, z[j]);
          z[j] = hn::Mul(hn::Mul(g[j], u[j]), act.slope);
          u[j] = hn::Mul(g[j], act.value);
        }
        return std::array{z, u};
      };
      const OutputRows<T, 2> rows = {{&to_gate, &to_up}, {dgate + out, dup + out}};
      map_bundles<T>(0, p.dim, make, rows);
    }
    to_gate.finish();
    to_up.finish();
  });
}

void swiglu_forward_any(const SwigluParams& p, void* y) {
  dispatch_storage(p.dtype, [&](auto t) { forward(p, static_cast<decltype(t)*>(y)); });
}

void swiglu_backward_any(const SwigluParams& p, const void* dy, void* dgate, void* dup) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    backward(p, static_cast<const T*>(dy), static_cast<T*>(dgate), static_cast<T*>(dup));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(swiglu_forward_any);
HWY_EXPORT(swiglu_backward_any);

namespace {

void check(const SwigluParams& p) {
  GDN_CHECK(p.rows >= 0 && p.dim >= 1, "[swiglu] dim must be at least 1, got ", p.dim);
}

double at(const SwigluParams& p, const void* data, const RowLayout& layout, int64_t row,
          int64_t i) {
  return dispatch_dtype(p.dtype, [&](auto t) -> double {
    return load(static_cast<const decltype(t)*>(data) + layout.offset(row, p.dim) + i);
  });
}

}  // namespace

void swiglu_forward(const SwigluParams& p, void* y) {
  check(p);
  HWY_DYNAMIC_DISPATCH(swiglu_forward_any)(p, y);
}

void swiglu_backward(const SwigluParams& p, const void* dy, void* dgate, void* dup) {
  check(p);
  HWY_DYNAMIC_DISPATCH(swiglu_backward_any)(p, dy, dgate, dup);
}

void swiglu_naive_forward(const SwigluParams& p, double* y) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double z = at(p, p.gate, p.gate_layout, row, i);
      y[row * p.dim + i] = z / (1 + std::exp(-z)) * at(p, p.up, p.up_layout, row, i);
    }
  }
}

void swiglu_naive_backward(const SwigluParams& p, const double* dy, double* dgate, double* dup) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double z = at(p, p.gate, p.gate_layout, row, i), s = 1 / (1 + std::exp(-z));
      const int64_t k = row * p.dim + i;
      dgate[k] = dy[k] * at(p, p.up, p.up_layout, row, i) * s * (1 + z * (1 - s));
      dup[k] = dy[k] * z * s;
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
