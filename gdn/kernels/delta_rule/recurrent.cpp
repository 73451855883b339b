// SPDX-License-Identifier: Apache-2.0
// The recurrence token by token: whole sequences, and one step in place on a pool of states.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/recurrent.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/core-inl.h"
#include "gdn/kernels/delta_rule/scratch.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// One token of one value head. The state S before the token is read with `erase` and `query`, which
// hold its decay where the read comes after it; the token then makes S <- decay S + k u^T (+ p r^T
// in the separate form).
template <typename T>
struct Token {
  Token() = default;
  Token(const DeltaRuleParams& params, size_t Kp, size_t Vp, Carver& carve)
      : decay(carve.take<T>(Kp)),
        erase(carve.take<T>(Kp)),
        query(carve.take<T>(Kp)),
        k(carve.take<T>(Kp)),
        p(params.erase == DeltaErase::kSeparate ? carve.take<T>(Kp) : nullptr),
        v(carve.take<T>(Vp)),
        beta(carve.take<T>(Vp)),
        r(carve.take<T>(Vp)),
        y(carve.take<T>(Vp)) {}

  void load(const DeltaRuleParams& x, int64_t t, int64_t hv, size_t Kp, size_t Vp) {
    const Tag<T> d;
    const int64_t key = (t * x.H + hv / (x.HV / x.H)) * x.K, row = t * x.HV + hv;
    const auto keys = [&](const void* src, T* dst) {
      load_row(x.dtype, src, key, x.K, dst);
      std::fill(dst + x.K, dst + Kp, T(0));
    };
    keys(x.q, query);
    keys(x.k, k);
    load_row(x.dtype, x.v, row * x.V, x.V, v);
    std::fill(v + x.V, v + Vp, T(0));
    const T* betas = static_cast<const T*>(x.beta);
    if (x.channel_beta) {
      std::copy_n(betas + row * x.V, x.V, beta);
    } else {
      std::fill_n(beta, x.V, betas != nullptr ? betas[row] : T(1));
    }
    std::fill(beta + x.V, beta + Vp, T(0));
    if (x.erase == DeltaErase::kKey) std::copy_n(k, Kp, erase);
    if (delta_rule::has_a(x.erase)) keys(x.a, erase);
    kq = dot(Kp, k, query);
    if (x.erase == DeltaErase::kSeparate) {
      keys(x.p, p);
      pq = dot(Kp, p, query);
    }
    std::fill_n(decay, Kp, T(0));
    const T* g = static_cast<const T*>(x.g);
    if (x.gate == DeltaGate::kScalar) std::fill_n(decay, Kp, g[row]);
    if (x.gate == DeltaGate::kChannel) std::copy_n(g + row * x.K, x.K, decay);
    for (size_t i = 0; i < Kp; i += hn::Lanes(d)) {
      const auto e = hn::Exp(d, hn::Load(d, decay + i));
      hn::Store(e, d, decay + i);
      hn::Store(hn::Mul(e, hn::Load(d, query + i)), d, query + i);
      if (x.erase == DeltaErase::kKey || x.erase == DeltaErase::kOwn) {
        hn::Store(hn::Mul(e, hn::Load(d, erase + i)), d, erase + i);
      }
    }
  }

  // From what the sweep has read for columns [j, j + n): turns v into u and y into the output.
  void solve(const DeltaRuleParams& x, size_t j, size_t n) {
    const Tag<T> d;
    const auto alpha = hn::Set(d, kq), gamma = hn::Set(d, pq);
    const auto scale = hn::Set(d, static_cast<T>(x.scale));
    for (const size_t end = j + n; j < end; j += hn::Lanes(d)) {
      auto u = hn::Load(d, v + j);
      const auto read = hn::Load(d, r + j);
      auto out = hn::Load(d, y + j);
      if (x.erase == DeltaErase::kSeparate) {
        out = hn::MulAdd(gamma, read, out);
      } else {
        if (x.erase != DeltaErase::kNone) u = hn::Sub(u, read);
        u = hn::Mul(hn::Load(d, beta + j), u);
        hn::Store(u, d, v + j);
      }
      out = hn::MulAdd(alpha, u, out);
      hn::Store(hn::Mul(scale, out), d, y + j);
    }
  }

  T *decay = nullptr, *erase = nullptr, *query = nullptr, *k = nullptr, *p = nullptr;  // [Kp]
  T *v = nullptr, *beta = nullptr;  // [Vp]: v, then u
  T *r = nullptr, *y = nullptr;     // [Vp]: S^T erase; S^T query, then o
  T kq = T(0), pq = T(0);
};

// One sweep over a block of kVectors vectors of columns: applies `update` to the state, and reads
// the result for `read`; either may be null. Doing both at once loads and stores each element once
// per token.
template <size_t kVectors, bool kErase, bool kSeparate, typename T>
HWY_INLINE void sweep_block(size_t K, T* HWY_RESTRICT s, size_t ld, const Token<T>* update,
                            Token<T>* read, size_t column) {
  const Tag<T> d;
  const size_t n = hn::Lanes(d);
  using Vec = hn::Vec<Tag<T>>;
  Vec u[kVectors], ru[kVectors], r[kVectors], y[kVectors];
  for (size_t j = 0; j < kVectors; ++j) {
    u[j] = update != nullptr ? hn::Load(d, update->v + column + j * n) : hn::Zero(d);
    ru[j] = kSeparate && update != nullptr ? hn::Load(d, update->r + column + j * n) : hn::Zero(d);
    r[j] = y[j] = hn::Zero(d);
  }
  const T* erase = read != nullptr ? read->erase : nullptr;
  const T* query = read != nullptr ? read->query : nullptr;
  for (size_t i = 0; i < K; ++i) {
    T* row = s + i * ld;
    Vec x[kVectors];
    for (size_t j = 0; j < kVectors; ++j) x[j] = hn::LoadU(d, row + j * n);
    if (update != nullptr) {
      const auto decay = hn::Set(d, update->decay[i]), k = hn::Set(d, update->k[i]);
      for (size_t j = 0; j < kVectors; ++j) x[j] = hn::MulAdd(k, u[j], hn::Mul(decay, x[j]));
      if constexpr (kSeparate) {
        const auto p = hn::Set(d, update->p[i]);
        for (size_t j = 0; j < kVectors; ++j) x[j] = hn::MulAdd(p, ru[j], x[j]);
      }
      for (size_t j = 0; j < kVectors; ++j) hn::StoreU(x[j], d, row + j * n);
    }
    if (read != nullptr) {
      const auto q = hn::Set(d, query[i]);
      for (size_t j = 0; j < kVectors; ++j) y[j] = hn::MulAdd(q, x[j], y[j]);
      if constexpr (kErase) {
        const auto a = hn::Set(d, erase[i]);
        for (size_t j = 0; j < kVectors; ++j) r[j] = hn::MulAdd(a, x[j], r[j]);
      }
    }
  }
  if (read == nullptr) return;
  for (size_t j = 0; j < kVectors; ++j) {
    hn::Store(r[j], d, read->r + column + j * n);
    hn::Store(y[j], d, read->y + column + j * n);
  }
}

template <size_t kVectors, typename T>
void sweep(const DeltaRuleParams& x, T* s, size_t ld, const Token<T>* update, Token<T>* read,
           size_t column) {
  // The two null checks become constants of each copy below, hoisted out of the loop over rows.
  const auto run = [&](const Token<T>* up, Token<T>* rd) HWY_ATTR {
    switch (x.erase) {
      case DeltaErase::kNone:
        return sweep_block<kVectors, false, false>(x.K, s, ld, up, rd, column);
      case DeltaErase::kSeparate:
        return sweep_block<kVectors, true, true>(x.K, s, ld, up, rd, column);
      default:
        return sweep_block<kVectors, true, false>(x.K, s, ld, up, rd, column);
    }
  };
  if (update == nullptr) {
    run(nullptr, read);
  } else if (read == nullptr) {
    run(update, nullptr);
  } else {
    run(update, read);
  }
}

// Columns a state is cut into for whole sequences: a block of K x kSequenceVectors vectors stays in
// L1.
inline constexpr size_t kSequenceVectors = 2;
// Tokens prepared at a time; each block of columns then runs through all of them.
inline constexpr int64_t kTokens = 16;

template <typename T>
struct Recurrent {
  Recurrent(const DeltaRuleParams& params, Carver& carve) : x(params) {
    const size_t n = lanes<T>();
    Kp = (x.K + n - 1) / n * n;
    Vp = (x.V + panel_width<T>() - 1) / panel_width<T>() * panel_width<T>();
    for (Token<T>& token : tokens) token = Token<T>(x, Kp, Vp, carve);
    state = carve.take<T>(Kp * Vp);
  }

  void run(const DeltaRuleOutputs& out, int64_t n, int64_t hv) {
    const size_t PW = panel_width<T>(), K = x.K, V = x.V;
    const int64_t task = n * x.HV + hv;
    const auto range = delta_rule::sequence_range(x, n);
    const T* initial = static_cast<const T*>(x.initial_state);
    std::fill_n(state, Kp * Vp, T(0));
    for (size_t c = 0; c < V && initial != nullptr; c += PW) {
      for (size_t i = 0; i < K; ++i) {
        std::copy_n(initial + (task * K + i) * V + c, std::min(PW, V - c), state + c * Kp + i * PW);
      }
    }
    for (int64_t begin = range.begin; begin < range.end; begin += kTokens) {
      const int64_t count = std::min(kTokens, range.end - begin);
      for (int64_t t = 0; t < count; ++t) tokens[t].load(x, begin + t, hv, Kp, Vp);
      for (size_t c = 0; c < V; c += PW) {
        T* block = state + c * Kp;
        for (int64_t t = 0; t <= count; ++t) {
          Token<T>* read = t < count ? &tokens[t] : nullptr;
          sweep<kSequenceVectors, T>(x, block, PW, t > 0 ? &tokens[t - 1] : nullptr, read, c);
          if (read != nullptr) read->solve(x, c, PW);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        store_row(x.dtype, out.o, ((begin + t) * x.HV + hv) * x.V, V, tokens[t].y);
      }
    }
    if (out.final_state == nullptr) return;
    T* last = static_cast<T*>(out.final_state);
    for (size_t c = 0; c < V; c += PW) {
      for (size_t i = 0; i < K; ++i) {
        std::copy_n(state + c * Kp + i * PW, std::min(PW, V - c), last + (task * K + i) * V + c);
      }
    }
  }

  const DeltaRuleParams& x;
  size_t Kp, Vp;
  Token<T> tokens[kTokens];
  T* state;  // [Vp / PW][Kp][PW]
};

// Vectors of columns per sweep of a step: the state streams by once in long pieces and is updated
// from L2.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr size_t kStepVectors = 8;
#else
inline constexpr size_t kStepVectors = 4;
#endif

template <typename T>
struct Step {
  Step(const DeltaRuleParams& params, Carver& carve) : x(params), n(lanes<T>()) {
    Kp = (x.K + n - 1) / n * n;
    Vp = (x.V + n - 1) / n * n;
    token = Token<T>(x, Kp, Vp, carve);
    edge = carve.take<T>(Kp * n);
  }

  void run(T* state, int64_t t, int64_t hv, void* o) {
    token.load(x, t, hv, Kp, Vp);
    const size_t V = x.V;
    size_t c = 0;
    for (; c + kStepVectors * n <= V; c += kStepVectors * n) columns<kStepVectors>(state + c, V, c);
    for (; c + 2 * n <= V; c += 2 * n) columns<2>(state + c, V, c);
    for (; c + n <= V; c += n) columns<1>(state + c, V, c);
    if (c < V) {  // less than a vector: by way of a padded copy
      for (int64_t i = 0; i < x.K; ++i) {
        std::fill_n(edge + i * n, n, T(0));
        std::copy_n(state + i * V + c, V - c, edge + i * n);
      }
      columns<1>(edge, n, c);
      for (int64_t i = 0; i < x.K; ++i) std::copy_n(edge + i * n, V - c, state + i * V + c);
    }
    store_row(x.dtype, o, (t * x.HV + hv) * x.V, V, token.y);
  }

  template <size_t kVectors>
  void columns(T* s, size_t ld, size_t c) {
    sweep<kVectors, T>(x, s, ld, nullptr, &token, c);
    token.solve(x, c, kVectors * n);
    sweep<kVectors, T>(x, s, ld, &token, nullptr, c);
  }

  const DeltaRuleParams& x;
  size_t n, Kp, Vp;
  Token<T> token;
  T* edge;  // [Kp][lanes]
};

template <typename T>
void run_recurrent(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  parallel_for(0, params.num_sequences * params.HV, 1, [&](int64_t begin, int64_t end) {
    Carver dry(nullptr);
    Recurrent<T>{params, dry};
    Carver carve(delta_rule::thread_scratch(dry.used()));
    Recurrent<T> worker(params, carve);
    for (int64_t task = begin; task < end; ++task)
      worker.run(out, task / params.HV, task % params.HV);
  });
}

template <typename T>
void run_step(const DeltaRuleParams& params, void* pool, const int64_t* slots, void* o) {
  const int64_t size = params.K * params.V;
  // Several small states per task: handing one out costs more than updating it.
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / size);
  parallel_for(0, params.num_sequences * params.HV, grain, [&](int64_t begin, int64_t end) {
    Carver dry(nullptr);
    Step<T>{params, dry};
    Carver carve(delta_rule::thread_scratch(dry.used()));
    Step<T> worker(params, carve);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / params.HV, hv = task % params.HV;
      const int64_t slot = slots != nullptr ? slots[n] : n;
      if (slot >= 0) {
        worker.run(static_cast<T*>(pool) + (slot * params.HV + hv) * size, n, hv, o);
      } else {
        const int64_t bytes = params.V * size_of(params.dtype);
        std::memset(static_cast<char*>(o) + task * bytes, 0, bytes);
      }
    }
  });
}

void recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  params.dtype == DType::kF64 ? run_recurrent<double>(params, out)
                              : run_recurrent<float>(params, out);
}
void step(const DeltaRuleParams& params, void* pool, const int64_t* slots, void* o) {
  params.dtype == DType::kF64 ? run_step<double>(params, pool, slots, o)
                              : run_step<float>(params, pool, slots, o);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "gdn/base/check.h"

namespace gdn {
namespace {
HWY_EXPORT(recurrent_forward);
HWY_EXPORT(step);
}  // namespace

void delta_rule_recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_recurrent_forward");
  delta_rule::check_outputs(params, out, "delta_rule_recurrent_forward");
  GDN_CHECK(
      out.saved == nullptr,
      "[delta_rule_recurrent_forward] saved must be null: only the chunk form has a backward");
  HWY_DYNAMIC_DISPATCH(recurrent_forward)(params, out);
}

void delta_rule_step(const DeltaRuleParams& params, void* pool, int64_t num_slots,
                     const int64_t* slots, void* o) {
  DeltaRuleParams x = params;
  x.cu_seqlens = nullptr;
  delta_rule::check_params(x, "delta_rule_step");
  GDN_CHECK(x.total_tokens == x.num_sequences,
            "[delta_rule_step] total_tokens must be num_sequences ", x.num_sequences, ", got ",
            x.total_tokens);
  if (x.num_sequences == 0) return;
  GDN_CHECK(pool != nullptr && o != nullptr, "[delta_rule_step] pool and o must be given");
  for (int64_t n = 0; n < x.num_sequences; ++n) {
    const int64_t slot = slots != nullptr ? slots[n] : n;
    GDN_CHECK(slot < num_slots, "[delta_rule_step] slots must be below num_slots ", num_slots,
              ", got ", slot);
  }
  HWY_DYNAMIC_DISPATCH(step)(x, pool, slots, o);
}

}  // namespace gdn
#endif
