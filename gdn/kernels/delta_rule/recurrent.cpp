// SPDX-License-Identifier: Apache-2.0
// The recurrence token by token over whole sequences.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/recurrent.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/token-inl.h"
#include "gdn/kernels/scratch.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

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
    const auto range = sequence_span(x, n);
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

template <typename T>
void run_recurrent(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  parallel_for(0, params.num_sequences * params.HV, 1, [&](int64_t begin, int64_t end) {
    Carver dry(nullptr);
    Recurrent<T>{params, dry};
    Carver carve(thread_scratch(dry.used()));
    Recurrent<T> worker(params, carve);
    for (int64_t task = begin; task < end; ++task)
      worker.run(out, task / params.HV, task % params.HV);
  });
}

void recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  params.dtype == DType::kF64 ? run_recurrent<double>(params, out)
                              : run_recurrent<float>(params, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "gdn/base/check.h"

namespace gdn {
namespace {
HWY_EXPORT(recurrent_forward);
}  // namespace

void delta_rule_recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out) {
  delta_rule::check_params(params, "delta_rule_recurrent_forward");
  delta_rule::check_outputs(params, out, "delta_rule_recurrent_forward");
  GDN_CHECK(
      out.saved == nullptr,
      "[delta_rule_recurrent_forward] saved must be null: only the chunk form has a backward");
  HWY_DYNAMIC_DISPATCH(recurrent_forward)(params, out);
}

}  // namespace gdn
#endif
