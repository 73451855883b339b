// SPDX-License-Identifier: Apache-2.0
// One token of one head, in place on its state; a decoding step. Vectors run along the channels,
// and the update of a layer's weights and their reading share one pass over memory. Include inside
// the foreach_target pattern.
#if defined(GDN_KERNELS_TEST_TIME_MEMORY_STEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_TEST_TIME_MEMORY_STEP_INL_H_
#undef GDN_KERNELS_TEST_TIME_MEMORY_STEP_INL_H_
#else
#define GDN_KERNELS_TEST_TIME_MEMORY_STEP_INL_H_
#endif

#include "gdn/kernels/test_time_memory/chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

template <typename T>
struct MemoryStepper {
  MemoryStepper(const MemoryStep& step, Carver& arena) : c(step), p(*step.params), s(p) {
    for (size_t l = 0; l < s.L; ++l) {
      x.push_back(arena.take<T>(s.rows[l]));
      a.push_back(arena.take<T>(s.rows[l]));
      z.push_back(arena.take<T>(s.out[l]));
      slope.push_back(arena.take<T>(s.out[l]));
      g.push_back(arena.take<T>(s.out[l]));
    }
    y = arena.take<T>(s.widest);
  }

  void run(int64_t n, int64_t h) {
    const int64_t slot = c.slots != nullptr ? c.slots[n] : n;
    if (slot < 0) return;
    const int64_t token = n * p.H + h, D = s.D;
    const int64_t weights = (slot * p.H + h) * static_cast<int64_t>(s.flat);
    auto at = [&](void* pool) {
      return pool == nullptr ? nullptr : static_cast<T*>(pool) + weights;
    };
    T *M = at(c.memory), *S = at(c.momentum), *G = at(c.gradient_at);
    auto row = [&](const void* t) { return static_cast<const T*>(t) + token * D; };
    auto gate = [&](const void* t, T absent) {
      return t == nullptr ? absent : static_cast<const T*>(t)[token];
    };
    gain = p.residual_norm ? static_cast<const T*>(p.norm_weight) + h * D : nullptr;
    offset = p.residual_norm ? static_cast<const T*>(p.norm_bias) + h * D : nullptr;
    gradients(row(p.k), row(p.v), G != nullptr ? G : M);

    std::copy_n(row(p.q), D, a[0]);
    const int64_t place = c.position[n] % p.chunk;
    const bool complete = place + 1 == p.chunk;
    const T rate = gate(p.rate, 0), eta = gate(p.eta, 0), keep = T(1) - gate(p.alpha, 0);
    const T tau = p.rule == MemoryRule::kTtt ? static_cast<const T*>(p.tau)[place] : T(0);
    const T* anchor = p.anchor != nullptr
                          ? static_cast<const T*>(p.anchor) + h * static_cast<int64_t>(s.flat)
                          : nullptr;
    for (size_t l = 0; l < s.L; ++l) {
      if (s.bias != 0) a[l][s.in[l]] = 1;
      const int64_t out = s.out[l];
      std::fill_n(y, out, T(0));
      for (size_t i = 0; i < s.rows[l]; ++i) {
        const size_t place_of_row = s.flat_at[l] + i * s.out[l];
        T* m = M + place_of_row;
        T* sum = S != nullptr ? S + place_of_row : nullptr;
        const T step = rate * x[l][i], read = a[l][i];
        if (p.rule == MemoryRule::kTtt) {
          ttt_row(out, m, sum, g[l], step, tau, read, complete);
        } else {
          lmm_row(out, m, sum, anchor != nullptr ? anchor + place_of_row : nullptr, g[l], step, eta,
                  keep, read);
        }
      }
      if (l + 1 == s.L) break;
      for_lanes<T>(out, [&](auto d, int64_t i) HWY_ATTR {
        auto f = hn::Zero(d), f1 = f, f2 = f;
        activate(d, p.activation, hn::LoadU(d, y + i), f, f1, f2);
        hn::StoreU(f, d, a[l + 1] + i);
      });
    }
    T* o = static_cast<T*>(c.o) + token * D;
    if (p.residual_norm) {
      T mean, rstd;
      moments(y, mean, rstd);
      for (int64_t i = 0; i < D; ++i) o[i] = a[0][i] + gain[i] * (y[i] - mean) * rstd + offset[i];
    } else {
      std::copy_n(y, D, o);
    }
    if (G != nullptr && complete) std::copy_n(M, s.flat, G);
  }

 private:
  // acc += step g; y += read (m - tau acc); at the end of the mini-batch m takes the sum.
  HWY_INLINE void ttt_row(int64_t out, T* m, T* acc, const T* grad, T step, T tau, T read,
                          bool complete) {
    T* to = y;
    for_lanes<T>(out, [=](auto d, int64_t i) HWY_ATTR {
      const auto sum = hn::MulAdd(hn::Set(d, step), hn::LoadU(d, grad + i), hn::LoadU(d, acc + i));
      const auto now = hn::NegMulAdd(hn::Set(d, tau), sum, hn::LoadU(d, m + i));
      hn::StoreU(hn::MulAdd(hn::Set(d, read), now, hn::LoadU(d, to + i)), d, to + i);
      hn::StoreU(complete ? hn::Zero(d) : sum, d, acc + i);
      if (complete) hn::StoreU(now, d, m + i);
    });
  }

  // s = eta s - step g; m = anchor + keep (m - anchor) + s; y += read m.
  HWY_INLINE void lmm_row(int64_t out, T* m, T* sum, const T* anchor, const T* grad, T step, T eta,
                          T keep, T read) {
    T* to = y;
    const bool before = p.read_before;
    for_lanes<T>(out, [=](auto d, int64_t i) HWY_ATTR {
      const auto old = hn::LoadU(d, m + i);
      auto change = hn::Mul(hn::Set(d, -step), hn::LoadU(d, grad + i));
      if (sum != nullptr) {
        change = hn::MulAdd(hn::Set(d, eta), hn::LoadU(d, sum + i), change);
        hn::StoreU(change, d, sum + i);
      }
      const auto base = anchor != nullptr ? hn::LoadU(d, anchor + i) : hn::Zero(d);
      const auto now = hn::Add(hn::MulAdd(hn::Set(d, keep), hn::Sub(old, base), base), change);
      hn::StoreU(now, d, m + i);
      hn::StoreU(hn::MulAdd(hn::Set(d, read), before ? old : now, hn::LoadU(d, to + i)), d, to + i);
    });
  }

  void moments(const T* v, T& mean, T& rstd) const {
    const auto D = static_cast<int64_t>(s.D);
    mean = sum_lanes<T>(D, [&](auto d, int64_t i) HWY_ATTR { return hn::LoadU(d, v + i); }) /
           static_cast<T>(D);
    const T m = mean;
    const T squares = sum_lanes<T>(D, [&](auto d, int64_t i) HWY_ATTR {
      const auto e = hn::Sub(hn::LoadU(d, v + i), hn::Set(d, m));
      return hn::Mul(e, e);
    });
    rstd = T(1) / std::sqrt(squares / static_cast<T>(D) + static_cast<T>(p.norm_eps));
  }

  // x: the layers' inputs for the key; g: the loss's gradients at their outputs, clipped.
  void gradients(const T* k, const T* v, const T* W) {
    const size_t top = s.L - 1;
    std::copy_n(k, s.D, x[0]);
    for (size_t l = 0; l < s.L; ++l) {
      if (s.bias != 0) x[l][s.in[l]] = 1;
      const int64_t out = s.out[l];
      T* to = z[l];
      std::fill_n(to, out, T(0));
      for (size_t i = 0; i < s.rows[l]; ++i) {
        const T* w = W + s.flat_at[l] + i * s.out[l];
        const T f = x[l][i];
        for_lanes<T>(out, [=](auto d, int64_t j) HWY_ATTR {
          hn::StoreU(hn::MulAdd(hn::Set(d, f), hn::LoadU(d, w + j), hn::LoadU(d, to + j)), d,
                     to + j);
        });
      }
      if (l == top) break;
      for_lanes<T>(out, [&](auto d, int64_t i) HWY_ATTR {
        auto f = hn::Zero(d), f1 = f, f2 = f;
        activate(d, p.activation, hn::LoadU(d, to + i), f, f1, f2);
        hn::StoreU(f, d, x[l + 1] + i);
        hn::StoreU(f1, d, slope[l] + i);
      });
    }
    top_gradient(k, v);
    for (size_t l = top; l > 0; --l) {
      const T* from = g[l];
      for (size_t i = 0; i < s.out[l - 1]; ++i) {
        const T* w = W + s.flat_at[l] + i * s.out[l];
        g[l - 1][i] = slope[l - 1][i] *
                      sum_lanes<T>(static_cast<int64_t>(s.out[l]), [&](auto d, int64_t j) HWY_ATTR {
                        return hn::Mul(hn::LoadU(d, w + j), hn::LoadU(d, from + j));
                      });
      }
    }
    if (p.clip <= 0) return;
    for (size_t l = 0; l < s.L; ++l) {
      const T norm = std::sqrt(dot_all(s.out[l], g[l], g[l]) * dot_all(s.rows[l], x[l], x[l]));
      if (norm <= static_cast<T>(p.clip)) continue;
      for (size_t i = 0; i < s.out[l]; ++i) g[l][i] *= static_cast<T>(p.clip) / norm;
    }
  }

  void top_gradient(const T* k, const T* v) {
    const T c_loss = static_cast<T>(p.loss_scale);
    const T* top = z[s.L - 1];
    T* out = g[s.L - 1];
    if (!p.residual_norm) {
      for (size_t i = 0; i < s.D; ++i) out[i] = c_loss * (top[i] - v[i]);
      return;
    }
    T mean, rstd, sum = 0, along = 0;
    moments(top, mean, rstd);
    for (size_t i = 0; i < s.D; ++i) {
      const T hat = (top[i] - mean) * rstd;
      out[i] = gain[i] * (gain[i] * hat + offset[i] - (v[i] - k[i]));
      sum += out[i];
      along += out[i] * hat;
    }
    sum /= static_cast<T>(s.D);
    along /= static_cast<T>(s.D);
    for (size_t i = 0; i < s.D; ++i) {
      const T hat = (top[i] - mean) * rstd;
      out[i] = c_loss * (out[i] - sum - hat * along) * rstd;
    }
  }

  const MemoryStep& c;
  const MemoryParams& p;
  MemoryShape<T> s;
  std::vector<T*> x, a, z, slope, g;  // per layer: inputs for key and query; for the key: outputs,
                                      // phi', gradients
  T* y;
  const T *gain = nullptr, *offset = nullptr;
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
