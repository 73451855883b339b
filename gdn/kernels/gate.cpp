// SPDX-License-Identifier: Apache-2.0
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/gate.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/gate.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "gdn/base/check.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// exp(A_log) of each channel's head, so that the loops over channels need no knowledge of heads; in
// this thread's scratch memory.
template <typename A>
const A* channel_rates(const GateParams& p) {
  A* rates = reinterpret_cast<A*>(thread_scratch(p.heads * p.channels * sizeof(A)));
  for (int64_t i = 0; i < p.heads * p.channels; ++i) {
    rates[i] = std::exp(static_cast<const A*>(p.A_log)[i / p.channels]);
  }
  return rates;
}

template <typename T, bool kSafe>
void gate_forward_t(const GateParams& p, Acc<T>* g) {
  using A = Acc<T>;
  const int64_t dim = p.heads * p.channels;
  const A* rate = channel_rates<A>(p);
  const A* dt_bias = static_cast<const A*>(p.dt_bias);
  const A bound = static_cast<A>(p.lower_bound.value_or(0));
  const int64_t lanes = hn::Lanes(hn::ScalableTag<A>());
  const int64_t element = sizeof(T) + sizeof(A);
  const Output to(p.rows * dim * element, g, dim * static_cast<int64_t>(sizeof(A)));
  parallel_for(0, p.rows, row_grain(4 * dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* a = static_cast<const T*>(p.a) + p.a_layout.offset(row, dim);
      const auto make = [&](auto d, auto count, int64_t i) GDN_INLINE_ATTR {
        const auto load = [&](const auto* p) GDN_INLINE_ATTR {
          return several<count.value>(
              [&](auto j) GDN_INLINE_ATTR { return load_as(d, p + i + j * lanes); });
        };
        auto x = load(a);
        if (dt_bias != nullptr) x = sv::Add(x, load(dt_bias));
        const auto r = load(rate);
        if constexpr (kSafe) {
          return sv::Mul(hn::Set(d, bound), sigmoid(d, sv::Mul(r, x)));
        } else {
          return sv::Neg(sv::Mul(r, softplus(d, x)));
        }
      };
      const auto store = [&](auto d, int64_t i, const auto& made) GDN_INLINE_ATTR {
        for_each<kCountOf<std::decay_t<decltype(made)>>>(
            [&](auto j) GDN_INLINE_ATTR { to.store(d, made[j], g + row * dim + i + j * lanes); });
      };
      // Registers hold two vectors and those that wait to be stored, not four.
      map_several<A, 2>(dim, make, store);
    }
    to.finish();
  });
}

// What the blocks of backward share.
template <typename T>
struct GateBackwardCall {
  const GateParams& p;
  const GateGrads& grads;
  const Acc<T>* rate;  // [dim]
  Output to;
};

// Rows [first, first + kRows) side by side, whose sums are loaded and stored once for all of them.
// decay: da = -rate * sigmoid(x) * dg (without the sigmoid where softplus(x) = x), dA_log = sum dg
// * g. safe:  with s = sigmoid(rate * x): da = dg * lower_bound * s * (1 - s) * rate, dA_log = sum
// da * x.
template <int kRows, bool kSafe, typename T>
HWY_INLINE void gate_backward_rows(const GateBackwardCall<T>& call, int64_t first, Acc<T>* sum_log,
                                   Acc<T>* sum_bias) {
  using A = Acc<T>;
  const GateParams& p = call.p;
  const int64_t dim = p.heads * p.channels;
  const A* dt_bias = static_cast<const A*>(p.dt_bias);
  const A* dg = static_cast<const A*>(call.grads.dg) + first * dim;
  const A bound = static_cast<A>(p.lower_bound.value_or(0));
  T* da = static_cast<T*>(call.grads.da) + first * dim;
  const T* a[kRows];
  for (int k = 0; k < kRows; ++k) {
    a[k] = static_cast<const T*>(p.a) + p.a_layout.offset(first + k, dim);
  }
  const auto make = [&](auto d, auto, int64_t i) GDN_INLINE_ATTR {
    const auto rate = hn::LoadU(d, call.rate + i);
    const auto bias = dt_bias == nullptr ? hn::Zero(d) : hn::LoadU(d, dt_bias + i);
    const auto x =
        several<kRows>([&](auto k) GDN_INLINE_ATTR { return hn::Add(load_as(d, a[k] + i), bias); });
    const auto scaled = [&](auto k) GDN_INLINE_ATTR {
      return hn::Mul(hn::LoadU(d, dg + k * dim + i), rate);
    };
    const auto add = [&](A* sums, const auto& rows) GDN_INLINE_ATTR {
      auto sum = hn::LoadU(d, sums + i);
      for_each<kRows>([&](auto k) GDN_INLINE_ATTR { sum = hn::Add(sum, rows[k]); });
      hn::StoreU(sum, d, sums + i);
    };
    if constexpr (kSafe) {
      const auto slope = sigmoid_and_slope(d, sv::Mul(rate, x)).slope;
      const auto dx = sv::Mul(several<kRows>(scaled), sv::Mul(hn::Set(d, bound), slope));
      add(sum_log, sv::Mul(dx, x));
      add(sum_bias, dx);
      return dx;
    } else {
      const auto soft = softplus_and_slope(d, x);
      const auto dlog = sv::Neg(several<kRows>(scaled));
      add(sum_log, sv::Mul(dlog, soft.value));
      const auto dx = sv::Mul(dlog, soft.slope);
      add(sum_bias, dx);
      return dx;
    }
  };
  const auto store = [&](auto d, int64_t i, const auto& dx) GDN_INLINE_ATTR {
    for_each<kRows>([&](auto k) GDN_INLINE_ATTR { call.to.store(d, dx[k], da + k * dim + i); });
  };
  map_several<A, 1, 2>(dim, make, store);
}

template <typename T, bool kSafe>
void gate_backward_t(const GateParams& p, const GateGrads& grads) {
  using A = Acc<T>;
  constexpr int kRows = kSideBySide;
  const int64_t dim = p.heads * p.channels;
  const A* rates = channel_rates<A>(p);
  const RowBlocks blocks(p.rows, row_grain(4 * dim));
  PageVector<A> partial(blocks.count() * 2 * dim);  // of dA_log by channel, then of ddt_bias
  const int64_t element = 2 * sizeof(T) + sizeof(A);
  const GateBackwardCall<T> call = {
      p, grads, rates,
      Output(p.rows * dim * element, grads.da, dim * static_cast<int64_t>(sizeof(T)))};
  parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) HWY_ATTR {
    for (int64_t block = first; block < last; ++block) {
      A* sum_log = partial.data() + block * 2 * dim;
      const int64_t end = blocks.end(block);
      int64_t row = blocks.begin(block);
      for (; row + kRows <= end; row += kRows) {
        gate_backward_rows<kRows, kSafe>(call, row, sum_log, sum_log + dim);
      }
      for (; row < end; ++row) gate_backward_rows<1, kSafe>(call, row, sum_log, sum_log + dim);
    }
    call.to.finish();
  });
  A* dA_log = static_cast<A*>(grads.dA_log);
  std::fill(dA_log, dA_log + p.heads, A{0});
  A* sums = partial.data();
  add_rows_up(sums, blocks.count(), 2 * dim);
  for (int64_t i = 0; i < dim; ++i) dA_log[i / p.channels] += sums[i];
  if (grads.ddt_bias != nullptr) {
    std::copy(sums + dim, sums + 2 * dim, static_cast<A*>(grads.ddt_bias));
  }
}

template <typename T>
void beta_forward_t(const BetaParams& p, Acc<T>* beta) {
  using A = Acc<T>;
  parallel_for(0, p.rows, row_grain(4 * p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* b = static_cast<const T*>(p.b) + p.b_layout.offset(row, p.dim);
      for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
        const auto v = hn::Mul(hn::Set(d, static_cast<A>(p.scale)), sigmoid(d, load_as(d, b + i)));
        hn::StoreU(v, d, beta + row * p.dim + i);
      });
    }
  });
}

template <typename T>
void beta_backward_t(const BetaParams& p, const Acc<T>* dbeta, T* db) {
  using A = Acc<T>;
  parallel_for(0, p.rows, row_grain(4 * p.dim), [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t row = begin; row < end; ++row) {
      const T* b = static_cast<const T*>(p.b) + p.b_layout.offset(row, p.dim);
      for_lanes<A>(p.dim, [&](auto d, int64_t i) HWY_ATTR {
        const auto s = sigmoid(d, load_as(d, b + i));
        const auto slope =
            hn::Mul(hn::Set(d, static_cast<A>(p.scale)), hn::Mul(s, hn::Sub(hn::Set(d, 1), s)));
        store_as(d, hn::Mul(slope, hn::LoadU(d, dbeta + row * p.dim + i)), db + row * p.dim + i);
      });
    }
  });
}

void gate_forward_any(const GateParams& p, void* g) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = p.lower_bound.has_value() ? gate_forward_t<T, true> : gate_forward_t<T, false>;
    run(p, static_cast<Acc<T>*>(g));
  });
}

void gate_backward_any(const GateParams& p, const GateGrads& grads) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    (p.lower_bound.has_value() ? gate_backward_t<T, true> : gate_backward_t<T, false>)(p, grads);
  });
}

void beta_forward_any(const BetaParams& p, void* beta) {
  dispatch_storage(p.dtype, [&](auto t) {
    beta_forward_t<decltype(t)>(p, static_cast<Acc<decltype(t)>*>(beta));
  });
}

void beta_backward_any(const BetaParams& p, const void* dbeta, void* db) {
  dispatch_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    beta_backward_t<T>(p, static_cast<const Acc<T>*>(dbeta), static_cast<T*>(db));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn {

HWY_EXPORT(gate_forward_any);
HWY_EXPORT(gate_backward_any);
HWY_EXPORT(beta_forward_any);
HWY_EXPORT(beta_backward_any);

namespace {

void check(const GateParams& p) {
  GDN_CHECK(p.rows >= 0 && p.heads >= 1 && p.channels >= 1,
            "[gate] heads and channels must be at least 1, got ", p.heads, " and ", p.channels);
  GDN_CHECK(!p.lower_bound.has_value() || *p.lower_bound < 0,
            "[gate] lower_bound must be negative, got ", p.lower_bound.value_or(0));
}

void check(const BetaParams& p) {
  GDN_CHECK(p.rows >= 0 && p.dim >= 1, "[beta] dim must be at least 1, got ", p.dim);
}

double at(DType dtype, const void* data, int64_t i) {
  return dispatch_dtype(
      dtype, [&](auto t) -> double { return load(static_cast<const decltype(t)*>(data) + i); });
}

double at_acc(DType dtype, const void* data, int64_t i) {
  return dtype == DType::kF64 ? static_cast<const double*>(data)[i]
                              : static_cast<const float*>(data)[i];
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// a + dt_bias of one element.
double naive_input(const GateParams& p, int64_t row, int64_t i) {
  const double a = at(p.dtype, p.a, p.a_layout.offset(row, p.heads * p.channels) + i);
  return p.dt_bias == nullptr ? a : a + at_acc(p.dtype, p.dt_bias, i);
}

}  // namespace

void gate_forward(const GateParams& p, void* g) {
  check(p);
  HWY_DYNAMIC_DISPATCH(gate_forward_any)(p, g);
}

void gate_backward(const GateParams& p, const GateGrads& grads) {
  check(p);
  HWY_DYNAMIC_DISPATCH(gate_backward_any)(p, grads);
}

void beta_forward(const BetaParams& p, void* beta) {
  check(p);
  HWY_DYNAMIC_DISPATCH(beta_forward_any)(p, beta);
}

void beta_backward(const BetaParams& p, const void* dbeta, void* db) {
  check(p);
  HWY_DYNAMIC_DISPATCH(beta_backward_any)(p, dbeta, db);
}

void gate_naive_forward(const GateParams& p, double* g) {
  const int64_t dim = p.heads * p.channels;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < dim; ++i) {
      const double x = naive_input(p, row, i),
                   rate = std::exp(at_acc(p.dtype, p.A_log, i / p.channels));
      g[row * dim + i] = p.lower_bound.has_value() ? *p.lower_bound * sigmoid(rate * x)
                                                   : -rate * (x > 20 ? x : std::log1p(std::exp(x)));
    }
  }
}

void gate_naive_backward(const GateParams& p, const double* dg, double* da, double* dA_log,
                         double* ddt_bias) {
  const int64_t dim = p.heads * p.channels;
  std::fill(dA_log, dA_log + p.heads, 0.0);
  if (ddt_bias != nullptr) std::fill(ddt_bias, ddt_bias + dim, 0.0);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < dim; ++i) {
      const double x = naive_input(p, row, i),
                   rate = std::exp(at_acc(p.dtype, p.A_log, i / p.channels));
      const double upstream = dg[row * dim + i];
      double dx, dlog;
      if (p.lower_bound.has_value()) {
        const double s = sigmoid(rate * x), ds = upstream * *p.lower_bound * s * (1 - s);
        dx = ds * rate;
        dlog = ds * x * rate;
      } else {
        dx = -upstream * rate * (x > 20 ? 1 : sigmoid(x));
        dlog = -upstream * rate * (x > 20 ? x : std::log1p(std::exp(x)));
      }
      da[row * dim + i] = dx;
      dA_log[i / p.channels] += dlog;
      if (ddt_bias != nullptr) ddt_bias[i] += dx;
    }
  }
}

void beta_naive_forward(const BetaParams& p, double* beta) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < p.dim; ++i) {
      beta[row * p.dim + i] =
          p.scale * sigmoid(at(p.dtype, p.b, p.b_layout.offset(row, p.dim) + i));
    }
  }
}

void beta_naive_backward(const BetaParams& p, const double* dbeta, double* db) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double s = sigmoid(at(p.dtype, p.b, p.b_layout.offset(row, p.dim) + i));
      db[row * p.dim + i] = dbeta[row * p.dim + i] * p.scale * s * (1 - s);
    }
  }
}

}  // namespace gdn
#endif  // HWY_ONCE
