// SPDX-License-Identifier: Apache-2.0
// One token for each sequence, in place on a pool of states.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/step.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/scratch.h"
#include "gdn/kernels/delta_rule/token-inl.h"
#include "gdn/kernels/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3
// bfloat16 that is rounded by an instruction (AVX512_BF16), where the portable way takes eight.
// Numbers below the normal range become 0.
struct HardwareBf16 {
  uint16_t bits;
};
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const HardwareBf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  return widen_bf16(d, hn::LoadU(d16, &p->bits));
}
template <class D>
HWY_INLINE void store_as(D d, hn::Vec<D> v, HardwareBf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  hn::Vec<decltype(d16)> half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half.raw) : "v"(v.raw));
  hn::StoreU(half, d16, &p->bits);
}
#endif

// Rows of a state that are handled at a time. A state streams by row after row, as prefetchers like
// it, once to be read and once, mostly from L2, to be updated. Cutting it into blocks of columns
// that stay in L1 was half as fast: rows 512 bytes apart fall into an eighth of L1's sets.
inline constexpr size_t kStepRows = 4;

// r += S^T erase and y += S^T query for kRows rows of S, `ld` apart.
template <size_t kRows, bool kErase, typename T, typename S>
HWY_INLINE void read_rows(const S* HWY_RESTRICT s, size_t ld, size_t columns, const T* erase,
                          const T* query, T* HWY_RESTRICT r, T* HWY_RESTRICT y) {
  const Tag<T> d;
  hn::Vec<Tag<T>> q[kRows], a[kRows];
  for (size_t i = 0; i < kRows; ++i) {
    q[i] = hn::Set(d, query[i]);
    a[i] = hn::Set(d, kErase ? erase[i] : T(0));
  }
  for (size_t j = 0; j < columns; j += hn::Lanes(d)) {
    auto ys = hn::Load(d, y + j), rs = hn::Load(d, r + j);
    for (size_t i = 0; i < kRows; ++i) {
      const auto x = load_as(d, s + i * ld + j);
      ys = hn::MulAdd(q[i], x, ys);
      if constexpr (kErase) rs = hn::MulAdd(a[i], x, rs);
    }
    hn::Store(ys, d, y + j);
    if constexpr (kErase) hn::Store(rs, d, r + j);
  }
}

// S <- decay S + k u^T (+ p r^T) for kRows rows; as many bytes are fetched from `next` on, unless
// it is null.
template <size_t kRows, bool kSeparate, typename T, typename S>
HWY_INLINE void update_rows(S* HWY_RESTRICT s, size_t ld, size_t columns, const Token<T>& token,
                            size_t row, size_t column, const S* next) {
  const Tag<T> d;
  hn::Vec<Tag<T>> decay[kRows], k[kRows], p[kRows];
  for (size_t i = 0; i < kRows; ++i) {
    decay[i] = hn::Set(d, token.decay[row + i]);
    k[i] = hn::Set(d, token.k[row + i]);
    p[i] = hn::Set(d, kSeparate ? token.p[row + i] : T(0));
  }
  const T *u = token.v + column, *r = token.r + column;
  for (size_t j = 0; j < columns; j += hn::Lanes(d)) {
    const auto us = hn::Load(d, u + j), rs = hn::Load(d, r + j);
    for (size_t i = 0; i < kRows; ++i) {
      auto x = hn::MulAdd(k[i], us, hn::Mul(decay[i], load_as(d, s + i * ld + j)));
      if constexpr (kSeparate) x = hn::MulAdd(p[i], rs, x);
      store_as(d, x, s + i * ld + j);
      if (next != nullptr) __builtin_prefetch(next + i * ld + j, 0, 2);
    }
  }
}

// T: the type of the arithmetic; S: the type of the states.
template <typename T, typename S>
struct Step {
  Step(const DeltaRuleParams& params, Carver& carve) : x(params), n(lanes<T>()) {
    Kp = (x.K + n - 1) / n * n;
    Vp = (x.V + n - 1) / n * n;
    token = Token<T>(x, Kp, Vp, carve);
    edge = carve.take<S>(Kp * n);
  }

  // `next`: the state that this thread updates after this one, or null.
  void run(S* state, const S* next, int64_t t, int64_t hv, void* o) {
    token.load(x, t, hv, Kp, Vp);
    std::fill_n(token.r, Vp, T(0));
    std::fill_n(token.y, Vp, T(0));
    const size_t V = x.V, whole = V / n * n;
    columns(state, V, 0, whole, next);
    if (whole < V) {  // less than a vector: by way of a padded copy
      for (int64_t i = 0; i < x.K; ++i) {
        std::fill_n(edge + i * n, n, S{});
        std::copy_n(state + i * V + whole, V - whole, edge + i * n);
      }
      columns(edge, n, whole, n, nullptr);
      for (int64_t i = 0; i < x.K; ++i) {
        std::copy_n(edge + i * n, V - whole, state + i * V + whole);
      }
    }
    store_row(x.dtype, o, (t * x.HV + hv) * x.V, V, token.y);
  }

 private:
  // Columns [begin, begin + count) of the state, whose first is at s.
  void columns(S* s, size_t ld, size_t begin, size_t count, const S* next) {
    if (count == 0) return;
    x.erase == DeltaErase::kNone ? read<false>(s, ld, begin, count)
                                 : read<true>(s, ld, begin, count);
    token.solve(x, begin, count);
    x.erase == DeltaErase::kSeparate ? update<true>(s, ld, begin, count, next)
                                     : update<false>(s, ld, begin, count, next);
  }
  template <bool kErase>
  void read(const S* s, size_t ld, size_t begin, size_t count) {
    T *r = token.r + begin, *y = token.y + begin;
    const size_t K = x.K;
    size_t i = 0;
    for (; i + kStepRows <= K; i += kStepRows) {
      read_rows<kStepRows, kErase>(s + i * ld, ld, count, token.erase + i, token.query + i, r, y);
    }
    for (; i < K; ++i) {
      read_rows<1, kErase>(s + i * ld, ld, count, token.erase + i, token.query + i, r, y);
    }
  }
  template <bool kSeparate>
  void update(S* s, size_t ld, size_t begin, size_t count, const S* next) {
    const size_t K = x.K;
    size_t i = 0;
    for (; i + kStepRows <= K; i += kStepRows) {
      update_rows<kStepRows, kSeparate>(s + i * ld, ld, count, token, i, begin,
                                        next != nullptr ? next + i * ld : nullptr);
    }
    for (; i < K; ++i) {
      update_rows<1, kSeparate>(s + i * ld, ld, count, token, i, begin, static_cast<S*>(nullptr));
    }
  }

  const DeltaRuleParams& x;
  size_t n, Kp, Vp;
  Token<T> token;
  S* edge;  // [Kp][lanes]
};

template <typename T, typename S>
void run_step(const DeltaRuleParams& params, const DeltaRulePool& pool, void* o) {
  const int64_t size = params.K * params.V, HV = params.HV;
  // The state of a task, or null where its sequence has none.
  const auto state = [&](int64_t task) -> S* {
    const int64_t slot = pool.slots != nullptr ? pool.slots[task / HV] : task / HV;
    return slot < 0 ? nullptr : static_cast<S*>(pool.states) + (slot * HV + task % HV) * size;
  };
  // Several small states per task: handing one out costs more than updating it.
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / size);
  parallel_for(0, params.num_sequences * HV, grain, [&](int64_t begin, int64_t end) {
    Carver dry(nullptr);
    Step<T, S>{params, dry};
    Carver carve(delta_rule::thread_scratch(dry.used()));
    Step<T, S> worker(params, carve);
    for (int64_t task = begin; task < end; ++task) {
      if (S* s = state(task); s != nullptr) {
        worker.run(s, task + 1 < end ? state(task + 1) : nullptr, task / HV, task % HV, o);
      } else {
        const int64_t bytes = params.V * size_of(params.dtype);
        std::memset(static_cast<char*>(o) + task * bytes, 0, bytes);
      }
    }
  });
}

void step(const DeltaRuleParams& params, const DeltaRulePool& pool, void* o) {
  if (params.dtype == DType::kF64) {
    run_step<double, double>(params, pool, o);
  } else if (pool.bf16) {
#if HWY_TARGET == HWY_AVX3
    if (__builtin_cpu_supports("avx512bf16")) return run_step<float, HardwareBf16>(params, pool, o);
#endif
    run_step<float, BFloat16>(params, pool, o);
  } else {
    run_step<float, float>(params, pool, o);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "gdn/base/check.h"

namespace gdn {
namespace {
HWY_EXPORT(step);
}  // namespace

void delta_rule_step(const DeltaRuleParams& params, const DeltaRulePool& pool, void* o) {
  DeltaRuleParams x = params;
  x.cu_seqlens = nullptr;
  delta_rule::check_params(x, "delta_rule_step");
  GDN_CHECK(x.total_tokens == x.num_sequences,
            "[delta_rule_step] total_tokens must be num_sequences ", x.num_sequences, ", got ",
            x.total_tokens);
  GDN_CHECK(!pool.bf16 || x.dtype != DType::kF64,
            "[delta_rule_step] states must be float64 for float64 inputs, got bfloat16");
  if (x.num_sequences == 0) return;
  GDN_CHECK(pool.states != nullptr && o != nullptr, "[delta_rule_step] pool and o must be given");
  for (int64_t n = 0; n < x.num_sequences; ++n) {
    const int64_t slot = pool.slots != nullptr ? pool.slots[n] : n;
    GDN_CHECK(slot < pool.num_slots, "[delta_rule_step] slots must be below num_slots ",
              pool.num_slots, ", got ", slot);
  }
  HWY_DYNAMIC_DISPATCH(step)(x, pool, o);
}

}  // namespace gdn
#endif
