// SPDX-License-Identifier: Apache-2.0
// One token for each sequence, in place on a pool of states.
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/delta_rule/step.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include <cstring>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/token-inl.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Vectors of columns whose sums stay in registers while a state streams by, row after row: with
// AVX-512 a whole row of 128 columns. It streams by twice, once to be read and once to be updated,
// the second time from L2. Blocks of columns that would fit into L1 do not: their rows, 512 bytes
// apart, fall into a fraction of its sets.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr size_t kStepVectors = 8;
#else
inline constexpr size_t kStepVectors = 4;
#endif

// What of a row of states of S goes to registers at once, where kVectors vectors of columns stay in
// them; the values that meet it are brought into the same order.
template <typename T, typename S, size_t kVectors>
using StepBundle = Bundle<Tag<T>, kVectors % 2 == 0 ? WholeBundle<S>::kCount : 1>;

// r = S^T erase and y = S^T query for kVectors vectors of columns; S has K rows `ld` apart.
template <size_t kVectors, bool kErase, typename T, typename S>
HWY_INLINE void step_read(size_t K, const S* HWY_RESTRICT s, size_t ld, const Token<T>& token,
                          size_t column) {
  using Bundle = StepBundle<T, S, kVectors>;
  const Bundle bundle{};
  constexpr size_t kBundles = kVectors / Bundle::kCount;
  const Tag<T> d;
  const size_t n = bundle.size();
  // Unrolled by order: or GCC keeps the sums in memory before and after the loop over rows.
  typename Bundle::Vectors r[kBundles], y[kBundles];
  HWY_UNROLL(8)
  for (size_t j = 0; j < kBundles; ++j) r[j] = y[j] = bundle.zero();
  const T *query = token.query, *erase = token.erase;
  for (size_t i = 0; i < K; ++i) {
    const auto q = hn::Set(d, query[i]), a = hn::Set(d, kErase ? erase[i] : T(0));
    HWY_UNROLL(8)
    for (size_t j = 0; j < kBundles; ++j) {
      const auto x = bundle.load(s + i * ld + j * n);
      HWY_UNROLL(2)
      for (int m = 0; m < Bundle::kCount; ++m) {
        y[j][m] = hn::MulAdd(q, x[m], y[j][m]);
        if constexpr (kErase) r[j][m] = hn::MulAdd(a, x[m], r[j][m]);
      }
    }
  }
  HWY_UNROLL(8)
  for (size_t j = 0; j < kBundles; ++j) {
    bundle.store(Output(), r[j], token.r + column + j * n);
    bundle.store(Output(), y[j], token.y + column + j * n);
  }
}

// S <- decay S + k u^T (+ p r^T)
template <size_t kVectors, bool kSeparate, typename T, typename S>
HWY_INLINE void step_update(size_t K, S* HWY_RESTRICT s, size_t ld, const Token<T>& token,
                            size_t column) {
  using Bundle = StepBundle<T, S, kVectors>;
  const Bundle bundle{};
  constexpr size_t kBundles = kVectors / Bundle::kCount;
  const Tag<T> d;
  const size_t n = bundle.size();
  typename Bundle::Vectors u[kBundles], r[kBundles];
  HWY_UNROLL(8)
  for (size_t j = 0; j < kBundles; ++j) {
    u[j] = bundle.load(token.v + column + j * n);
    if constexpr (kSeparate) r[j] = bundle.load(token.r + column + j * n);
  }
  const T *HWY_RESTRICT decays = token.decay, *HWY_RESTRICT keys = token.k;
  const T* HWY_RESTRICT low_rank = token.p;
  for (size_t i = 0; i < K; ++i) {
    const auto decay = hn::Set(d, decays[i]), k = hn::Set(d, keys[i]);
    const auto p = hn::Set(d, kSeparate ? low_rank[i] : T(0));
    HWY_UNROLL(8)
    for (size_t j = 0; j < kBundles; ++j) {
      auto x = bundle.load(s + i * ld + j * n);
      HWY_UNROLL(2)
      for (int m = 0; m < Bundle::kCount; ++m) {
        x[m] = hn::MulAdd(k, u[j][m], hn::Mul(decay, x[m]));
        if constexpr (kSeparate) x[m] = hn::MulAdd(p, r[j][m], x[m]);
      }
      bundle.store(Output(), x, s + i * ld + j * n);
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

  void run(S* state, int64_t t, int64_t hv, void* o) {
    token.load(x, t, hv, Kp, Vp);
    const size_t V = x.V, block = kStepVectors * n;
    size_t c = 0;
    for (; c + block <= V; c += block) columns<kStepVectors>(state + c, V, c);
    for (; c + 2 * n <= V; c += 2 * n) columns<2>(state + c, V, c);
    for (; c + n <= V; c += n) columns<1>(state + c, V, c);
    if (c < V) {  // less than a vector: by way of a padded copy
      for (int64_t i = 0; i < x.K; ++i) {
        std::fill_n(edge + i * n, n, S{});
        std::copy_n(state + i * V + c, V - c, edge + i * n);
      }
      columns<1>(edge, n, c);
      for (int64_t i = 0; i < x.K; ++i) std::copy_n(edge + i * n, V - c, state + i * V + c);
    }
    store_row(x.dtype, o, (t * x.HV + hv) * x.V, V, token.y);
  }

 private:
  template <size_t kVectors>
  void columns(S* s, size_t ld, size_t c) {
    x.erase == DeltaErase::kNone ? step_read<kVectors, false>(x.K, s, ld, token, c)
                                 : step_read<kVectors, true>(x.K, s, ld, token, c);
    token.solve(x, c, kVectors * n);
    x.erase == DeltaErase::kSeparate ? step_update<kVectors, true>(x.K, s, ld, token, c)
                                     : step_update<kVectors, false>(x.K, s, ld, token, c);
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
    Carver carve(thread_scratch(dry.used()));
    Step<T, S> worker(params, carve);
    for (int64_t task = begin; task < end; ++task) {
      if (S* s = state(task); s != nullptr) {
        worker.run(s, task / HV, task % HV, o);
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
