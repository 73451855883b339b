// SPDX-License-Identifier: Apache-2.0
// All chunks of one head of one sequence, forward. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_TEST_TIME_MEMORY_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_TEST_TIME_MEMORY_FORWARD_INL_H_
#undef GDN_KERNELS_TEST_TIME_MEMORY_FORWARD_INL_H_
#else
#define GDN_KERNELS_TEST_TIME_MEMORY_FORWARD_INL_H_
#endif

#include "gdn/kernels/test_time_memory/chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// What forward and backward share of walking along a sequence.
template <typename T>
struct MemoryWalk {
  MemoryWalk(const MemoryParams& params, Carver& arena) : p(params), core(params, arena) {
    const auto& s = core.s;
    if (p.rule == MemoryRule::kLmm) G = arena.take<T>(s.padded);
    if (p.sequential) strict = arena.take<T>(s.NP * s.NP);
  }

  // Whether TTT's sum is zero where the call's tokens begin, whatever the state holds.
  bool starts_mini_batch(int64_t n) const {
    const auto range = test_time_memory::tokens_of(p, n);
    return p.rule == MemoryRule::kTtt && range.begin < range.end && range.position % p.chunk == 0;
  }

  // The state at the start of the call.
  void start(int64_t n, int64_t h, T* M, T* S) {
    const auto& s = core.s;
    const int64_t task = n * p.H + h;
    core.load_head(h);
    s.load(core.head(p.memory, s.flat, task), M);
    if (p.rule == MemoryRule::kLmm && !p.sequential) {
      if (p.gradient_at != nullptr) {
        s.load(core.head(p.gradient_at, s.flat, task), G);
      } else {
        std::copy_n(M, s.padded, G);
      }
    }
    if (p.momentum != nullptr && !starts_mini_batch(n)) {
      s.load(core.head(p.momentum, s.flat, task), S);
    } else {
      std::fill_n(S, s.padded, T(0));
    }
  }

  // Loads the coefficients of the chunk of tokens [t, t + n) and makes its gradients; with the
  // products k_i . k_j in `kk` in the exact form.
  ChunkKind gradients(const test_time_memory::Tokens& range, int64_t t, int64_t h, const T* M,
                      const T* S, KeyPass<T>& key, T* kk) {
    const int64_t position = range.position + t - range.begin;
    const ChunkKind kind =
        chunk_kind(p, test_time_memory::count_from(p, range, t), position, p.momentum != nullptr);
    core.co.load(p, kind, t, h, position);
    if (p.sequential) {
      core.solve(t, kind, h, M, S, key, strict, kk);
    } else {
      core.key_pass(t, kind, h, gradient_weights(kind, M), key);
    }
    return kind;
  }

  // The weights at which a chunk takes its gradients, M being those of its start.
  const T* gradient_weights(const ChunkKind& kind, const T* M) const {
    return p.rule == MemoryRule::kTtt || kind.fresh ? M : G;
  }

  const MemoryParams& p;
  MemoryCore<T> core;
  T* G = nullptr;       // [padded] gradient_at of the call's start
  T* strict = nullptr;  // [NP][NP]
};

template <typename T>
struct MemoryForward {
  MemoryForward(const MemoryParams& params, Carver& arena) : walk(params, arena) {
    const auto& s = walk.core.s;
    key.take(arena, s, params.clip > 0);
    M = arena.take<T>(s.padded);
    S = arena.take<T>(s.padded);
    kk = arena.take<T>(s.NP * s.NP);
  }

  void run(const MemoryOutputs& out, int64_t n, int64_t h, int64_t segment, T* saved) {
    const MemoryParams& p = walk.p;
    auto& core = walk.core;
    const auto& s = core.s;
    const int64_t task = n * p.H + h;
    const auto range = test_time_memory::tokens_of(p, n);
    walk.start(n, h, M, S);
    const bool keeps_gradient_at = out.gradient_at != nullptr && !p.sequential;
    T* gradient_at = keeps_gradient_at
                         ? static_cast<T*>(out.gradient_at) + task * static_cast<int64_t>(s.flat)
                         : nullptr;
    bool complete = false;
    if (keeps_gradient_at && range.begin == range.end) s.store(walk.G, gradient_at);
    int64_t number = 0;
    for (int64_t t = range.begin; t < range.end; ++number) {
      if (saved != nullptr && number > 0 && number % segment == 0) {
        s.store(M, saved);
        saved += s.flat;
        if (test_time_memory::tensors_per_state(p) == 2) {
          s.store(S, saved);
          saved += s.flat;
        }
      }
      const ChunkKind kind = walk.gradients(range, t, h, M, S, key, kk);
      core.read_pass(t, kind, h, M, S, key);
      core.output();
      core.store_tokens(core.tmp, t, kind.n, h, out.o);
      t += kind.n;
      complete = kind.complete;
      if (keeps_gradient_at && t == range.end && !complete)
        s.store(walk.gradient_weights(kind, M), gradient_at);
      if (t < range.end || out.memory != nullptr) core.end(kind, key, M, S, M, S);
    }
    if (out.momentum != nullptr)
      s.store(S, static_cast<T*>(out.momentum) + task * static_cast<int64_t>(s.flat));
    if (out.memory == nullptr) return;
    s.store(M, static_cast<T*>(out.memory) + task * static_cast<int64_t>(s.flat));
    if (keeps_gradient_at && complete) s.store(M, gradient_at);
  }

  MemoryWalk<T> walk;
  KeyPass<T> key;
  T *M, *S, *kk;
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
