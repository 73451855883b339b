// SPDX-License-Identifier: Apache-2.0
// The backward pass of one head of one sequence: segments from the last to the first, each run
// forward again, then its chunks backward; steps (i) to (iv) of README.md. Include inside the
// foreach_target pattern.
#if defined(GDN_KERNELS_TEST_TIME_MEMORY_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_TEST_TIME_MEMORY_BACKWARD_INL_H_
#undef GDN_KERNELS_TEST_TIME_MEMORY_BACKWARD_INL_H_
#else
#define GDN_KERNELS_TEST_TIME_MEMORY_BACKWARD_INL_H_
#endif

#include "gdn/kernels/test_time_memory/forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Gradients of a chunk's coefficients, and from them those of the gates.
template <typename T>
struct CoefficientGrads {
  void take(Carver& arena, size_t NP_) {
    NP = NP_;
    for (T** m : {&om_t, &H}) *m = arena.take<T>(NP * NP);
    for (T** v : {&read_beta, &read_cc, &lam, &kap, &beta, &cc, &rate, &eta, &alpha})
      *v = arena.take<T>(NP);
  }
  void clear() {
    std::fill_n(om_t, NP * NP, T(0));
    std::fill_n(H, NP * NP, T(0));
    for (T* v : {read_beta, read_cc, lam, kap, beta, cc, rate, eta, alpha})
      std::fill_n(v, NP, T(0));
    beta_n = c_n = m_n = 0;
  }

  // The sums of rate and tau in all of om_t, lam, kap, read_cc and c_n.
  void ttt(const Coefficients<T>& co, T* dtau, int64_t position, int64_t chunk) {
    const int64_t n = co.n;
    for (int64_t t = 0; t < n; ++t) {
      T sum = -read_cc[t];
      for (int64_t j = 0; j <= t; ++j) {
        sum += om_t[j * NP + t] * co.rate[j];
        rate[j] += om_t[j * NP + t] * co.tau[t];
      }
      if (t == n - 1) {
        sum -= c_n;
        for (int64_t j = 0; j < n; ++j) {
          sum += lam[j] * co.rate[j];
          rate[j] += lam[j] * co.tau[t] - kap[j];
        }
      }
      dtau[(position + t) % chunk] += sum;
    }
  }

  void lmm(const Coefficients<T>& co, bool read_before) {
    const int64_t n = co.n, NPs = static_cast<int64_t>(NP);
    for (int64_t t = read_before ? 1 : 0; t < n; ++t) {
      const int64_t s = read_before ? t - 1 : t;
      beta[s] += read_beta[t];
      cc[s] += read_cc[t];
      for (int64_t j = 0; j <= s; ++j) {
        H[s * NPs + j] += om_t[j * NPs + t] * co.rate[j];
        rate[j] += om_t[j * NPs + t] * co.H[s * NPs + j];
      }
    }
    beta[n - 1] += beta_n;
    cc[n - 1] += c_n;
    for (int64_t j = 0; j < n; ++j) {
      H[(n - 1) * NPs + j] += lam[j] * co.rate[j];
      rate[j] += lam[j] * co.H[(n - 1) * NPs + j] + kap[j] * co.m_to[(n - 1) * NPs + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      T gh = H[(n - 1) * NPs + j], gm = kap[j] * co.rate[j] + gh;
      for (int64_t t = n - 1; t > j; --t) {
        alpha[t] -= gh * co.H[(t - 1) * NPs + j];
        eta[t] += gm * co.m_to[(t - 1) * NPs + j];
        gh = co.keep[t] * gh + H[(t - 1) * NPs + j];
        gm = co.eta[t] * gm + gh;
      }
    }
    // The start columns: cc (from 0) with m0 (from 1), and beta (from 1).
    T gh = cc[n - 1], gm = m_n + gh, gb = beta[n - 1];
    for (int64_t t = n - 1; t >= 0; --t) {
      alpha[t] -= t > 0 ? gh * co.cc[t - 1] + gb * co.beta[t - 1] : gb;
      eta[t] += gm * (t > 0 ? co.m0[t - 1] : T(1));
      if (t == 0) break;
      gh = co.keep[t] * gh + cc[t - 1];
      gm = co.eta[t] * gm + gh;
      gb = co.keep[t] * gb + beta[t - 1];
    }
  }

  size_t NP = 0;
  T *om_t, *H;
  T *read_beta, *read_cc, *lam, *kap, *beta, *cc;
  T beta_n = 0, c_n = 0, m_n = 0;
  T *rate, *eta, *alpha;
};

template <typename T>
struct MemoryBackward {
  MemoryBackward(const MemoryParams& params, int64_t segment, Carver& arena)
      : walk(params, arena), p(params), core(walk.core), s(core.s) {
    keys.resize(segment);
    for (auto& key : keys) {
      key.take(arena, s, p.clip > 0);
      Ms.push_back(arena.take<T>(s.padded));
      Ss.push_back(arena.take<T>(s.padded));
      kks.push_back(p.sequential ? arena.take<T>(s.NP * s.NP) : nullptr);
    }
    gc.take(arena, s.NP);
    for (T** w : {&dM, &dS, &dG}) *w = arena.take<T>(s.padded);
    if (p.anchor != nullptr) d_anchor = arena.take<T>(s.padded);
    for (size_t l = 0; l < s.L; ++l) {
      dX.push_back(arena.take<T>(s.rows[l] * s.NP));
      R.push_back(arena.take<T>(s.out[l] * s.NP));
    }
    for (T** x : {&dA, &dY, &dY_rows, &hold}) *x = arena.take<T>(s.widest * s.NP);
    for (T** m : {&T_t, &T_rows, &P_rows}) *m = arena.take<T>(s.NP * s.NP);
    dQ = arena.take<T>(s.D * s.NP);
    dK = arena.take<T>(s.D * s.NP);
    dV = arena.take<T>(s.D * s.NP);
    for (T** x : {&d_gain, &d_offset}) *x = arena.take<T>(s.D);
    dtau = arena.take<T>(std::max(s.NP, s.C));
  }

  void run(const MemoryGrads& g, int64_t n, int64_t h, int64_t segment, const T* saved) {
    const int64_t task = n * p.H + h, flat = s.flat;
    const auto range = test_time_memory::tokens_of(p, n);
    const int64_t chunks = test_time_memory::num_chunks(p, range);
    const int64_t tensors = test_time_memory::tensors_per_state(p);
    std::vector<int64_t> starts;
    for (int64_t t = range.begin; t < range.end; t += test_time_memory::count_from(p, range, t))
      starts.push_back(t);
    auto load_or_zero = [&](const void* src, T* dst) {
      if (src != nullptr) {
        s.load(core.head(src, flat, task), dst);
      } else {
        std::fill_n(dst, s.padded, T(0));
      }
    };
    load_or_zero(g.memory_out, dM);
    load_or_zero(g.momentum_out, dS);
    load_or_zero(g.gradient_at_out, dG);
    std::fill_n(dtau, s.C, T(0));
    std::fill_n(d_gain, s.D, T(0));
    std::fill_n(d_offset, s.D, T(0));
    const bool complete = p.sequential || (range.position + range.end - range.begin) % p.chunk == 0;
    if (chunks > 0 && complete) {  // gradient_at became the new memory
      combine(s.padded, T(1), dG, T(1), dM);
      std::fill_n(dG, s.padded, T(0));
    }
    left_gradient_at = g.gradient_at_out != nullptr && !complete;
    if (d_anchor != nullptr) std::fill_n(d_anchor, s.padded, T(0));

    for (int64_t end = chunks; end > 0;) {
      const int64_t begin = (end - 1) / segment * segment;
      if (begin == 0) {
        walk.start(n, h, Ms[0], Ss[0]);
      } else {
        core.load_head(h);
        const T* kept = saved + (begin / segment - 1) * tensors * flat;
        s.load(kept, Ms[0]);
        std::fill_n(Ss[0], s.padded, T(0));
        if (tensors == 2) s.load(kept + flat, Ss[0]);
      }
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = c - begin;
        const ChunkKind kind = walk.gradients(range, starts[c], h, Ms[i], Ss[i], keys[i], kks[i]);
        if (c + 1 == end) break;
        core.end(kind, keys[i], Ms[i], Ss[i], Ms[i + 1], Ss[i + 1]);
      }
      for (int64_t c = end - 1; c >= begin; --c) chunk(g, range, starts[c], h, c - begin);
      end = begin;
    }

    auto store = [&](const T* src, void* dst) {
      if (dst != nullptr) s.store(src, static_cast<T*>(dst) + task * flat);
    };
    if (walk.starts_mini_batch(n)) std::fill_n(dS, s.padded, T(0));
    store(dM, g.memory);
    store(dS, g.momentum);
    store(dG, g.gradient_at);
    if (d_anchor != nullptr) store(d_anchor, g.anchor);
    auto copy = [&](const T* src, int64_t size, void* dst) {
      if (dst != nullptr) std::copy_n(src, size, static_cast<T*>(dst) + task * size);
    };
    copy(dtau, p.chunk, g.tau);
    copy(d_gain, p.D, g.norm_weight);
    copy(d_offset, p.D, g.norm_bias);
  }

 private:
  void chunk(const MemoryGrads& g, const test_time_memory::Tokens& range, int64_t t, int64_t h,
             int64_t i) {
    const int64_t position = range.position + t - range.begin;
    const ChunkKind kind =
        chunk_kind(p, test_time_memory::count_from(p, range, t), position, p.momentum != nullptr);
    KeyPass<T>& key = keys[i];
    core.co.load(p, kind, t, h, position);
    core.read_pass(t, kind, h, Ms[i], Ss[i], key);
    gc.clear();
    if (p.rule == MemoryRule::kTtt && kind.complete) std::fill_n(dS, s.padded, T(0));
    top_of_read(g, t, kind, h);
    for (size_t l = s.L; l-- > 0;) read_layer(l, kind, Ms[i], Ss[i], key);
    std::copy_n(dA, s.D * s.NP, core.tmp);
    combine(s.D * s.NP, T(1), core.tmp, T(1), dQ);
    if (p.sequential) {
      unsolve(kind, Ms[i], Ss[i], key, kks[i]);
    } else {
      key_layers(kind, Ms[i], key);
    }
    store(dQ, t, kind.n, h, g.q);
    store(dK, t, kind.n, h, g.k);
    store(dV, t, kind.n, h, g.v);
    p.rule == MemoryRule::kTtt ? gc.ttt(core.co, dtau, position, p.chunk)
                               : gc.lmm(core.co, p.read_before);
    auto gate = [&](const T* src, void* dst) {
      if (dst == nullptr) return;
      for (int64_t j = 0; j < kind.n; ++j) static_cast<T*>(dst)[(t + j) * p.H + h] = src[j];
    };
    gate(gc.rate, g.rate);
    gate(gc.eta, g.eta);
    gate(gc.alpha, g.alpha);
  }

  void store(const T* src, int64_t first, int64_t n, int64_t h, void* dst) const {
    if (dst != nullptr) core.store_tokens(src, first, n, h, dst);
  }

  // dY of the last layer, and what the output's norm passes on.
  void top_of_read(const MemoryGrads& g, int64_t t, const ChunkKind& kind, int64_t h) {
    if (g.o != nullptr) {
      core.load_tokens(g.o, t, kind.n, h, dY);
    } else {
      std::fill_n(dY, s.D * s.NP, T(0));
    }
    if (!p.residual_norm) {
      std::fill_n(dQ, s.D * s.NP, T(0));
      return;
    }
    std::copy_n(dY, s.D * s.NP, dQ);
    const T *dO = dQ, *gain = core.gain;
    norm_parameters(core.Y[s.L - 1], dO, nullptr);
    core.project(
        core.Y[s.L - 1],
        [&](auto d, size_t i, size_t at, auto)
            HWY_ATTR { return hn::Mul(hn::Set(d, gain[i]), hn::Load(d, dO + at)); },
        dY);
  }

  // d_gain += sum of e x^, d_offset += sum of e over the tokens, x^ the normed z; with `r`, d_gain
  // also += sum of r.
  void norm_parameters(const T* z, const T* e, const T* r) {
    const Tag<T> d;
    for (size_t j = 0; j < s.NP; j += hn::Lanes(d)) {
      auto mean = hn::Zero(d), rstd = hn::Zero(d);
      core.moments(d, z, j, mean, rstd);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * s.NP + j;
        const auto x = hn::Mul(hn::Sub(hn::Load(d, z + at), mean), rstd);
        const auto value = hn::Load(d, e + at);
        auto product = hn::Mul(value, x);
        if (r != nullptr) product = hn::Add(product, hn::Load(d, r + at));
        d_gain[i] += hn::GetLane(hn::SumOfLanes(d, product));
        d_offset[i] += hn::GetLane(hn::SumOfLanes(d, value));
      }
    }
  }

  // Step (i) for layer l: from dY to dA (the gradient at A_l), dX, R, and through M and S.
  void read_layer(size_t l, const ChunkKind& kind, const T* M, const T* S, const KeyPass<T>& key) {
    const size_t NP = s.NP, rows = s.rows[l], out = s.out[l];
    const auto& co = core.co;
    const T *A = core.A[l], *X = key.X[l], *D = key.D[l], *score = core.scores[l];
    // dP^T[j][t] = -d_j . dY_t in the lower triangle.
    gemm<Into::kSet, true>(NP, NP, out, D, NP, dY, NP, T_rows, NP);
    for (size_t j = 0; j < NP; ++j) {
      for (size_t t = 0; t < NP; ++t) {
        const T dP = -T_rows[j * NP + t];
        if (t >= j) gc.om_t[j * NP + t] += dP * score[j * NP + t];
        T_t[j * NP + t] = dP * co.om_t[j * NP + t];
      }
    }
    transpose_any(NP, NP, T_t, NP, T_rows, NP);
    transpose_any(NP, NP, core.minus_P[l], NP, P_rows, NP);

    core.template apply_transposed<Into::kSet>(l, rows, M, dY, dA);
    if (p.rule == MemoryRule::kLmm) {
      dot_tokens(rows, NP, A, dA, T(1), gc.read_beta);
      scale_tokens(rows, NP, co.read_beta, dA, dA);
    }
    auto add = [&](const T* W, const T* weights, T sign, T* d_weights) {
      core.template apply_transposed<Into::kSet>(l, rows, W, dY, hold);
      dot_tokens(rows, NP, A, hold, sign, d_weights);
      scale_tokens(rows, NP, weights, hold, hold);
      combine(rows * NP, T(1), hold, T(1), dA);
    };
    if (kind.use_s) add(S, co.read_cc, T(1), gc.read_cc);
    if (core.anchor != nullptr) add(core.anchor, co.read_rest, T(-1), gc.read_beta);
    gemm<Into::kAdd, false>(rows, NP, NP, X, NP, T_t, NP, dA, NP);

    gemm<Into::kSet, false>(rows, NP, NP, A, NP, T_rows, NP, dX[l], NP);
    gemm<Into::kSet, false>(out, NP, NP, dY, NP, P_rows, NP, R[l], NP);
    if (kind.write_m) through_end(l, co.lam, dM, X, D, gc.lam);
    if (kind.write_s) through_end(l, co.kap, dS, X, D, gc.kap);

    through_decay(l, kind, M, S);
    auto outer = [&](const T* weights, T* dW) {
      scale_tokens(out, NP, weights, dY, hold);
      core.to_rows(l, hold, dY_rows);
      core.add_outer(l, rows, kind.n, A, dY_rows, dW);
    };
    if (p.rule == MemoryRule::kLmm) {
      outer(co.read_beta, dM);
    } else {
      core.to_rows(l, dY, dY_rows);
      core.add_outer(l, rows, kind.n, A, dY_rows, dM);
    }
    if (kind.use_s) outer(co.read_cc, dS);
    if (core.anchor != nullptr) outer(co.read_rest, d_anchor);
    if (l > 0) {
      const T *da = dA, *f = core.FY[l - 1];
      T* dy = dY;
      for_tokens<T>(s.out[l - 1], NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Mul(hn::Load(d, da + i), hn::Load(d, f + i)), d, dy + i);
      });
    }
  }

  // M' = beta_n M + c_n S + (1 - beta_n) anchor and S' = m_n S of the chunk's end: dM and dS become
  // the gradients of M and S.
  void through_decay(size_t l, const ChunkKind& kind, const T* M, const T* S) {
    const auto& co = core.co;
    const size_t size = s.rows[l] * s.ld[l], at = s.at[l];
    if (p.rule == MemoryRule::kTtt) {  // beta_n = m_n = 1
      if (!kind.write_m || !kind.use_s) return;
      gc.c_n += dot_all(size, S + at, dM + at);
      combine(size, co.c_n, dM + at, T(1), dS + at);
      return;
    }
    const Tag<T> d;
    const T *m = M + at, *sum = kind.use_s ? S + at : nullptr;
    const T* start = core.anchor != nullptr ? core.anchor + at : nullptr;
    T *dm = dM + at, *ds = dS + at, *d_start = start != nullptr ? d_anchor + at : nullptr;
    auto beta = hn::Zero(d), c = hn::Zero(d), momentum = hn::Zero(d);
    const auto beta_n = hn::Set(d, co.beta_n), rest = hn::Set(d, T(1) - co.beta_n);
    const auto c_n = hn::Set(d, co.c_n), m_n = hn::Set(d, co.m_n);
    for (size_t i = 0; i < size; i += hn::Lanes(d)) {
      const auto g = hn::Load(d, dm + i);
      auto from = hn::Load(d, m + i);
      if (start != nullptr) {
        from = hn::Sub(from, hn::Load(d, start + i));
        hn::Store(hn::MulAdd(rest, g, hn::Load(d, d_start + i)), d, d_start + i);
      }
      beta = hn::MulAdd(from, g, beta);
      hn::Store(hn::Mul(beta_n, g), d, dm + i);
      if (sum == nullptr) continue;
      const auto old = hn::Load(d, sum + i), gs = hn::Load(d, ds + i);
      c = hn::MulAdd(old, g, c);
      momentum = hn::MulAdd(old, gs, momentum);
      hn::Store(hn::MulAdd(m_n, gs, hn::Mul(c_n, g)), d, ds + i);
    }
    gc.beta_n += hn::GetLane(hn::SumOfLanes(d, beta));
    gc.c_n += hn::GetLane(hn::SumOfLanes(d, c));
    gc.m_n += hn::GetLane(hn::SumOfLanes(d, momentum));
  }

  // The chunk's end, W' = ... - (w X)^T D with W' having the gradient dW: adds to dX, R and dw.
  void through_end(size_t l, const T* w, const T* dW, const T* X, const T* D, T* dw) {
    const size_t NP = s.NP, out = s.out[l];
    scale_tokens(out, NP, w, D, hold);
    scale(out * NP, T(-1), hold);
    core.template apply_transposed<Into::kAdd>(l, s.rows[l], dW, hold, dX[l]);
    core.template apply<Into::kSet>(l, dW, X, hold);
    dot_tokens(out, NP, hold, D, T(-1), dw);
    const T* h = hold;
    T* r = R[l];
    for_tokens<T>(out, NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
      hn::Store(hn::NegMulAdd(hn::Load(d, w + j), hn::Load(d, h + i), hn::Load(d, r + i)), d,
                r + i);
    });
  }

  // Steps (ii) to (iv): through the gradients themselves.
  void key_layers(const ChunkKind& kind, const T* M, const KeyPass<T>& key) {
    const size_t NP = s.NP, top = s.L - 1;
    const T* Wg = walk.gradient_weights(kind, M);
    // Where the gradient of Wg belongs: M of this chunk's start, where they are one.
    const bool own = kind.fresh || p.rule == MemoryRule::kTtt;
    T* dW = own ? dM : dG;
    if (own && left_gradient_at) {  // what the call left as gradient_at was this M
      combine(s.padded, T(1), dG, T(1), dW);
      std::fill_n(dG, s.padded, T(0));
      left_gradient_at = false;
    }
    if (p.clip > 0) {
      for (size_t l = 0; l < s.L; ++l) unclip(l, key);
    }
    for (size_t l = 0; l < top; ++l) {
      const size_t out = s.out[l];
      const T *f = key.F[l], *g = key.G[l], *z = key.Z[l];
      T *r = R[l], *dh = hold;
      for_tokens<T>(out, NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Mul(hn::Load(d, r + i), hn::Load(d, f + i)), d, dh + i);
      });
      // Only the inputs below the bias.
      gemm<Into::kAdd, true>(s.out[l + 1], NP, out, Wg + s.at[l + 1], s.ld[l + 1], hold, NP,
                             R[l + 1], NP);
      core.add_outer(l + 1, out, kind.n, hold, key.Du_rows[l + 1], dW);
      for_tokens<T>(out, NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        auto a = hn::Zero(d), a1 = hn::Zero(d), a2 = hn::Zero(d);
        activate(d, p.activation, hn::Load(d, z + i), a, a1, a2);
        hn::Store(hn::Mul(hn::Mul(hn::Load(d, r + i), hn::Load(d, g + i)), a2), d, r + i);
      });
    }
    std::fill_n(dK, s.D * NP, T(0));
    top_of_keys(kind, key);
    for (size_t l = s.L; l-- > 0;) {  // R is dZ now
      core.to_rows(l, R[l], dY_rows);
      core.add_outer(l, s.rows[l], kind.n, key.X[l], dY_rows, dW);
      core.template apply_transposed<Into::kAdd>(l, s.rows[l], Wg, R[l], dX[l]);
      if (l == 0) break;
      const T *dx = dX[l], *f = key.F[l - 1];
      T* dz = R[l - 1];
      for_tokens<T>(s.out[l - 1], NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::MulAdd(hn::Load(d, dx + i), hn::Load(d, f + i), hn::Load(d, dz + i)), d,
                  dz + i);
      });
    }
    combine(s.D * NP, T(1), dX[0], T(1), dK);
  }

  // R holds the gradient of the clipped D; makes it that of D itself and adds the factor's to dX.
  void unclip(size_t l, const KeyPass<T>& key) {
    const size_t NP = s.NP, out = s.out[l];
    T *along = T_t, *dd = T_t + NP, *xx = T_t + 2 * NP;  // free by now
    for (T* v : {along, dd, xx}) std::fill_n(v, NP, T(0));
    const T* f = key.factor[l];
    dot_tokens(out, NP, R[l], key.Du[l], T(1), along);
    dot_tokens(out, NP, key.Du[l], key.Du[l], T(1), dd);
    dot_tokens(s.rows[l], NP, key.X[l], key.X[l], T(1), xx);
    for (size_t t = 0; t < NP; ++t) {
      const bool clipped = f[t] < T(1);
      dd[t] = clipped ? f[t] * along[t] / dd[t] : T(0);
      xx[t] = clipped ? f[t] * along[t] / xx[t] : T(0);
    }
    T *r = R[l], *dx = dX[l];
    const T *du = key.Du[l], *x = key.X[l];
    for_tokens<T>(out, NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
      const auto direct = hn::Mul(hn::Load(d, f + j), hn::Load(d, r + i));
      hn::Store(hn::NegMulAdd(hn::Load(d, dd + j), hn::Load(d, du + i), direct), d, r + i);
    });
    for_tokens<T>(s.rows[l], NP, [&](auto d, size_t i, size_t j) HWY_ATTR {
      hn::Store(hn::NegMulAdd(hn::Load(d, xx + j), hn::Load(d, x + i), hn::Load(d, dx + i)), d,
                dx + i);
    });
  }

  // Step (iii): from R to dZ of the top layer, dV and what reaches K without the layers.
  void top_of_keys(const ChunkKind& kind, const KeyPass<T>& key) {
    const size_t NP = s.NP, top = s.L - 1;
    const T c = static_cast<T>(p.loss_scale);
    scale(s.D * NP, c, R[top]);
    T* r = R[top];
    if (!p.residual_norm) {
      const T* from = r;
      T* dv = dV;
      for_tokens<T>(s.D, NP, [&](auto d, size_t i, size_t) HWY_ATTR {
        hn::Store(hn::Neg(hn::Load(d, from + i)), d, dv + i);
      });
      return;
    }
    const T *z = key.Z[top], *k = key.X[0], *v = key.V, *gain = core.gain, *offset = core.offset;
    T *dr = dY, *rr = hold;  // [D][NP]
    std::copy_n(r, s.D * NP, dY_rows);
    const T* R_in = dY_rows;
    core.project(  // de = N(R) / s
        z, [&](auto d, size_t, size_t at, auto) HWY_ATTR { return hn::Load(d, R_in + at); }, dr);
    const Tag<T> d;
    const auto inv = hn::Set(d, T(1) / static_cast<T>(s.D));
    for (size_t j = 0; j < NP; j += hn::Lanes(d)) {
      auto mean = hn::Zero(d), rstd = hn::Zero(d);
      core.moments(d, z, j, mean, rstd);
      auto sum_e = hn::Zero(d), e_x = hn::Zero(d), R_x = hn::Zero(d);
      auto hat = [&](size_t at)
                     HWY_ATTR { return hn::Mul(hn::Sub(hn::Load(d, z + at), mean), rstd); };
      auto residual = [&](size_t i, size_t at) HWY_ATTR {
        const auto target = hn::Sub(hn::Load(d, v + at), hn::Load(d, k + at));
        return hn::Sub(hn::MulAdd(hn::Set(d, gain[i]), hat(at), hn::Set(d, offset[i])), target);
      };
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * NP + j;
        const auto e = hn::Mul(hn::Set(d, gain[i]), residual(i, at)), x = hat(at);
        sum_e = hn::Add(sum_e, e);
        e_x = hn::MulAdd(e, x, e_x);
        R_x = hn::MulAdd(hn::Load(d, R_in + at), x, R_x);
      }
      const auto mean_e = hn::Mul(sum_e, inv), mean_ex = hn::Mul(e_x, inv),
                 mean_Rx = hn::Mul(R_x, inv);
      // G = N(e) / s, and R . G
      auto R_G = hn::Zero(d);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * NP + j;
        const auto e = hn::Mul(hn::Set(d, gain[i]), residual(i, at));
        const auto G = hn::Mul(hn::Sub(e, hn::MulAdd(hat(at), mean_ex, mean_e)), rstd);
        R_G = hn::MulAdd(hn::Load(d, R_in + at), G, R_G);
      }
      const auto inward = hn::Mul(hn::Mul(R_G, rstd), inv);
      // dx, then dZ = N(dx) / s - x^ (R.G) / (s d)
      auto sum_dx = hn::Zero(d), dx_x = hn::Zero(d);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * NP + j;
        const auto g = hn::Set(d, gain[i]), res = residual(i, at), e = hn::Mul(g, res);
        const auto de = hn::Load(d, dr + at), grad_r = hn::Mul(g, de);
        const auto bend = hn::MulAdd(hn::Load(d, R_in + at), mean_ex, hn::Mul(e, mean_Rx));
        const auto dx = hn::NegMulAdd(bend, rstd, hn::Mul(g, grad_r));
        hn::Store(hn::Mul(de, res), d, rr + at);
        hn::Store(grad_r, d, dr + at);
        hn::Store(dx, d, r + at);
        sum_dx = hn::Add(sum_dx, dx);
        dx_x = hn::MulAdd(dx, hat(at), dx_x);
      }
      const auto mean_dx = hn::Mul(sum_dx, inv), mean_dxx = hn::Mul(dx_x, inv);
      for (size_t i = 0; i < s.D; ++i) {
        const size_t at = i * NP + j;
        const auto x = hat(at);
        const auto n = hn::Sub(hn::Load(d, r + at), hn::MulAdd(x, mean_dxx, mean_dx));
        hn::Store(hn::NegMulAdd(x, inward, hn::Mul(n, rstd)), d, r + at);
      }
    }
    norm_parameters(z, dr, rr);
    const T* grad_r = dr;
    T *dk = dK, *dv = dV;
    for_tokens<T>(s.D, NP, [&](auto d, size_t i, size_t) HWY_ATTR {
      hn::Store(hn::Load(d, grad_r + i), d, dk + i);
      hn::Store(hn::Neg(hn::Load(d, grad_r + i)), d, dv + i);
    });
  }

  // The exact form of depth 1: R goes back through the triangular solve.
  void unsolve(const ChunkKind& kind, const T* M, const T* S, const KeyPass<T>& key, const T* kk) {
    const size_t NP = s.NP, rows = s.rows[0];
    const int64_t n = kind.n, NPs = static_cast<int64_t>(NP);
    auto& co = core.co;
    const T c = static_cast<T>(p.loss_scale);
    const T *K = key.X[0], *D = key.D[0];
    T* strict = P_rows;
    std::fill_n(strict, NP * NP, T(0));
    for (int64_t i = 1; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j)
        strict[i * NPs + j] = -c * co.rate[j] * co.H[(i - 1) * NPs + j] * kk[i * NPs + j];
    }
    T* x = R[0];  // becomes the right side's gradient
    core.template solve_rows<true>(strict, x, dY_rows);
    // dL_ij = -x_i . d_j for j < i
    gemm<Into::kSet, true>(NP, NP, s.D, x, NP, D, NP, T_rows, NP);
    std::fill_n(T_t, NP * NP, T(0));
    for (int64_t i = 1; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const T dL = -T_rows[i * NPs + j], h = co.H[(i - 1) * NPs + j], k_k = kk[i * NPs + j];
        T_t[j * NPs + i] = dL * c * co.rate[j] * h;  // TL transposed
        gc.H[(i - 1) * NPs + j] += dL * c * co.rate[j] * k_k;
        gc.rate[j] += dL * c * h * k_k;
      }
    }
    transpose_any(NP, NP, T_t, NP, T_rows, NP);
    gemm<Into::kAdd, false>(rows, NP, NP, K, NP, T_t, NP, dX[0], NP);     // TL K
    gemm<Into::kAdd, false>(rows, NP, NP, K, NP, T_rows, NP, dX[0], NP);  // TL^T K
    T *before = hold, *sums = hold + NP;  // of the token before: c beta or c cc
    auto side = [&](const T* W, const T* weights, T first, T* d_weights, T* dW) {
      for (int64_t t = 0; t < NPs; ++t)
        before[t] = t >= n ? T(0) : c * (t == 0 ? first : weights[t - 1]);
      std::fill_n(sums, NP, T(0));
      core.template apply_transposed<Into::kSet>(0, rows, W, x, dA);
      dot_tokens(rows, NP, K, dA, c, sums);
      for (int64_t t = 1; t < n; ++t) d_weights[t - 1] += sums[t];
      scale_tokens(rows, NP, before, dA, dA);
      combine(rows * NP, T(1), dA, T(1), dX[0]);
      scale_tokens(s.D, NP, before, x, dY);
      core.to_rows(0, dY, dY_rows);
      core.add_outer(0, rows, n, K, dY_rows, dW);
    };
    side(M, co.beta, T(1), gc.beta, dM);
    if (kind.use_s) side(S, co.cc, T(0), gc.cc, dS);
    T* dv = dV;
    for_tokens<T>(s.D, NP, [&](auto d, size_t i, size_t) HWY_ATTR {
      hn::Store(hn::Mul(hn::Set(d, -c), hn::Load(d, x + i)), d, dv + i);
    });
    std::copy_n(dX[0], s.D * NP, dK);
  }

  MemoryWalk<T> walk;
  const MemoryParams& p;
  MemoryCore<T>& core;
  const MemoryShape<T>& s;
  std::vector<KeyPass<T>> keys;  // of the segment's chunks, as the next three
  std::vector<T*> Ms, Ss, kks;
  CoefficientGrads<T> gc;
  T *dM, *dS, *dG;  // [padded]
  T* d_anchor = nullptr;
  std::vector<T*> dX, R;        // per layer: gradients at X and at D
  T *dA, *dY, *dY_rows, *hold;  // [widest][NP]
  T *T_t, *T_rows, *P_rows;     // [NP][NP]
  T *dQ, *dK, *dV;              // [D][NP]
  T *d_gain, *d_offset, *dtau;
  bool left_gradient_at = false;  // dG holds the gradient of a gradient_at not yet met
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
