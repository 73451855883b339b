// SPDX-License-Identifier: Apache-2.0
// The chunk form backward over whole sequences, chunks from last to first: by key heads where there
// are enough of them for the threads, else all threads on one head. Both give the same bits.
// Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_BACKWARD_RUN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_BACKWARD_RUN_INL_H_
#undef GDN_KERNELS_DELTA_RULE_BACKWARD_RUN_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_BACKWARD_RUN_INL_H_
#endif

#include <vector>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/backward-inl.h"
#include "gdn/kernels/delta_rule/plan.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// The state that value head hv of sequence n has at token `done` (a multiple of the segment).
template <typename T>
const T* state_before(const DeltaRuleParams& x, const T* saved, int64_t saved_offset, int64_t n,
                      int64_t hv, int64_t tokens, int64_t done) {
  const int64_t size = x.K * x.V;
  if (done == 0) {
    const T* initial = static_cast<const T*>(x.initial_state);
    return initial != nullptr ? initial + (n * x.HV + hv) * size : nullptr;
  }
  const int64_t index =
      hv * delta_rule::saved_states(x, tokens) + done / delta_rule::segment(x) - 1;
  return saved + saved_offset + index * size;
}

// One thread on some key heads of a sequence.
template <typename Chunk>
struct BackwardByHead {
  using T = typename Chunk::T;
  BackwardByHead(const DeltaRuleParams& params, int64_t heads, Carver& carve) : ctx(params, carve) {
    const auto& L = ctx.core.L;
    per_segment = delta_rule::segment(params) / L.C;
    states = carve.take<T>(heads * L.group * per_segment * L.state_size());
    d_states = carve.take<T>(heads * L.group * L.state_size());
  }

  // The task's key heads go through the chunks together: their rows are neighbours in memory.
  void run(const T* saved, const DeltaRuleGrads& grads, const delta_rule::Task& task,
           int64_t saved_offset) {
    const int64_t n = task.n, h0 = task.h0, h1 = task.h1;
    auto& core = ctx.core;
    const auto& x = core.x;
    const auto& L = core.L;
    const typename Chunk::Scope scope(ctx);
    const int64_t C = L.C, group = L.group, size = x.K * x.V, first = h0 * group;
    const auto range = sequence_span(x, n);
    const int64_t tokens = range.size(), segment = delta_rule::segment(x);
    core.clear();
    for (int64_t hv = first; hv < h1 * group; ++hv) {
      const T* last = static_cast<const T*>(grads.d_final_state);
      core.load_state(last != nullptr ? last + (n * x.HV + hv) * size : nullptr,
                      d_state(hv - first));
    }
    for (int64_t done = (tokens - 1) / segment * segment; tokens > 0 && done >= 0;
         done -= segment) {
      const int64_t begin = range.begin + done, end = std::min(begin + segment, range.end);
      for (int64_t hv = first; hv < h1 * group; ++hv) {
        recompute_states(state_before(x, saved, saved_offset, n, hv, tokens, done), saved, grads,
                         begin, end, hv, hv - first);
      }
      for (int64_t c = (end - begin - 1) / C; c >= 0; --c) {
        const int64_t t = begin + c * C;
        for (int64_t h = h0; h < h1; ++h) {
          chunk(saved, grads, t, std::min(C, end - t), h, c, first, range.begin);
        }
      }
    }
    if (grads.d_initial_state == nullptr) return;
    for (int64_t hv = first; hv < h1 * group; ++hv) {
      core.store_state(d_state(hv - first),
                       static_cast<T*>(grads.d_initial_state) + (n * x.HV + hv) * size);
    }
  }

 private:
  T* state(int64_t i, int64_t c) const {
    return states + (i * per_segment + c) * ctx.core.L.state_size();
  }
  T* d_state(int64_t i) const { return d_states + i * ctx.core.L.state_size(); }

  void recompute_states(const T* start, const T* saved, const DeltaRuleGrads& grads, int64_t begin,
                        int64_t end, int64_t hv, int64_t i) {
    auto& core = ctx.core;
    const auto& L = core.L;
    const int64_t C = L.C;
    core.load_state(start, state(i, 0));
    int64_t c = 0;
    for (int64_t t = begin; t + C < end; t += C, ++c) {
      const int64_t left = end - t - C;
      core.ahead.clear();
      if (left > C) {
        expect_recompute(saved, t + C, C, hv);
      } else {
        expect(saved, grads, t + C, left, hv);
      }
      ctx.begin_advance(saved, t, C, hv);
      for (size_t p = 0; p < L.panels; ++p) {
        const size_t at = p * L.Kp * L.PW;
        ctx.advance(p, state(i, c) + at, state(i, c + 1) + at);
      }
    }
  }

  void chunk(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t count, int64_t h,
             int64_t c, int64_t first, int64_t begin) {
    auto& core = ctx.core;
    const auto& L = core.L;
    const size_t panel = L.Kp * L.PW;
    ctx.begin_keys(t, count, h);
    for (int64_t hv = h * L.group; hv < (h + 1) * static_cast<int64_t>(L.group); ++hv) {
      const T* s = state(hv - first, c);
      T* ds = d_state(hv - first);
      core.ahead.clear();
      if (t > begin) expect(saved, grads, t - L.C, L.C, hv);
      ctx.prepare(saved, grads, t, count, hv);
      for (size_t p = 0; p < L.panels; ++p) ctx.retreat_values(p, ds + p * panel);
      ctx.key_products(s, ds);
      for (size_t p = 0; p < L.panels; ++p) ctx.retreat_state(p, ds + p * panel, ds + p * panel);
      ctx.head_grads(grads, t, count, hv);
    }
    ctx.store_keys(grads, t, count, h);
  }

  // What the chunk of n tokens from t, the one before this in the sequence, will touch.
  void expect(const T* saved, const DeltaRuleGrads& grads, int64_t t, size_t n, int64_t hv) {
    auto& core = ctx.core;
    const auto& x = core.x;
    const int64_t h = hv / core.L.group;
    for (const void* keys : {x.q, x.k, x.a, x.p}) core.expect_keys(keys, t, n, h);
    for (const void* keys : {grads.dq, grads.dk, grads.da, grads.dp}) {
      core.expect_keys(keys, t, n, h);
    }
    core.expect_values(x.dtype, grads.d_o, t, n, hv);
    core.expect_values(x.dtype, grads.dv, t, n, hv);
    expect_written(saved, t, n, hv);
    core.ahead.spread(ctx.pauses());
  }
  // What recomputing the state after the chunk of n tokens from t will touch.
  void expect_recompute(const T* saved, int64_t t, size_t n, int64_t hv) {
    auto& core = ctx.core;
    const auto& x = core.x;
    for (const void* keys : {x.k, x.p}) core.expect_keys(keys, t, n, hv / core.L.group);
    expect_written(saved, t, n, hv);
    core.ahead.spread(ctx.advance_pauses());
  }
  void expect_written(const T* saved, int64_t t, size_t n, int64_t hv) {
    auto& core = ctx.core;
    const auto& x = core.x;
    const bool reads_v = x.erase == DeltaErase::kNone || x.erase == DeltaErase::kSeparate;
    if (reads_v) core.expect_values(x.dtype, x.v, t, n, hv);
    if (x.erase != DeltaErase::kNone) core.expect_values(kDTypeOf<T>, saved, t, n, hv);
  }

  Chunk ctx;
  int64_t per_segment;   // chunks per segment
  T *states, *d_states;  // [heads][per_segment] states of a segment; [heads]
};

// All threads on one key head: what belongs to a chunk alone is shared out by chunks, the
// recurrence of the states by panels of values.
template <typename Chunk>
struct BackwardTogether {
  using T = typename Chunk::T;
  // Between two waits of the threads for each other.
  static constexpr int64_t kTokens = 256;
  BackwardTogether(const DeltaRuleParams& params, Carver& carve)
      : x(params), L(Chunk::layout(params)), max_chunks(kTokens / L.C) {
    chunks.reserve(max_chunks);
    for (int64_t c = 0; c < max_chunks; ++c) chunks.emplace_back(params, carve, /*shared=*/true);
    states = carve.take<T>(max_chunks * L.state_size());
    d_chain = carve.take<T>((max_chunks + 1) * L.state_size());
    d_states = carve.take<T>(L.group * L.state_size());
  }

  void run(const T* saved, const DeltaRuleGrads& grads, const delta_rule::Task& task,
           int64_t saved_offset) {
    for (int64_t h = task.h0; h < task.h1; ++h) head(saved, grads, task.n, h, saved_offset);
  }

 private:
  void head(const T* saved, const DeltaRuleGrads& grads, int64_t n, int64_t h,
            int64_t saved_offset) {
    const int64_t C = L.C, group = L.group, size = x.K * x.V, first = h * group;
    const auto range = sequence_span(x, n);
    const int64_t tokens = range.size(), span = max_chunks * C;
    auto& core = chunks[0].core;
    for (auto& ctx : chunks) ctx.core.clear();
    for (int64_t i = 0; i < group; ++i) {
      const T* last = static_cast<const T*>(grads.d_final_state);
      core.load_state(last != nullptr ? last + (n * x.HV + first + i) * size : nullptr,
                      d_states + i * L.state_size());
    }
    for (int64_t done = (tokens - 1) / span * span; tokens > 0 && done >= 0; done -= span) {
      const int64_t begin = range.begin + done, end = std::min(begin + span, range.end);
      const int64_t count = (end - begin + C - 1) / C;
      const auto by_chunk = [&](auto f) {
        parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
          const typename Chunk::Scope scope(chunks[0]);
          for (int64_t c = from; c < to; ++c) {
            f(chunks[c], c, begin + c * C, std::min(C, end - begin - c * C));
          }
        });
      };
      for (int64_t i = 0; i < group; ++i) {
        const int64_t hv = first + i;
        by_chunk([&](Chunk& ctx, int64_t, int64_t t, int64_t left) {
          if (i == 0) ctx.begin_keys(t, left, h);
          ctx.prepare(saved, grads, t, left, hv);
        });
        parallel_for(0, L.panels, 1, [&](int64_t from, int64_t to) {
          const typename Chunk::Scope scope(chunks[0]);
          for (int64_t p = from; p < to; ++p) {
            panel(p, saved, saved_offset, n, hv, i, tokens, done, count);
          }
        });
        by_chunk([&](Chunk& ctx, int64_t c, int64_t t, int64_t left) {
          ctx.key_products(states + c * L.state_size(), d_chain + (c + 1) * L.state_size());
          ctx.head_grads(grads, t, left, hv);
          if (i + 1 == group) ctx.store_keys(grads, t, left, h);
        });
      }
    }
    if (grads.d_initial_state == nullptr) return;
    for (int64_t i = 0; i < group; ++i) {
      core.store_state(d_states + i * L.state_size(),
                       static_cast<T*>(grads.d_initial_state) + (n * x.HV + first + i) * size);
    }
  }

  // The states before each chunk and the gradients of those after, for panel p of value head hv.
  void panel(int64_t p, const T* saved, int64_t saved_offset, int64_t n, int64_t hv, int64_t i,
             int64_t tokens, int64_t done, int64_t count) {
    const int64_t size = L.state_size(), at = p * L.Kp * L.PW, C = L.C;
    const int64_t segment = delta_rule::segment(x);
    for (int64_t c = 0; c < count; ++c) {
      T* s = states + c * size;
      if (c * C % segment == 0) {
        const T* from = state_before(x, saved, saved_offset, n, hv, tokens, done + c * C);
        load_panel(from, p, s + at);
      } else {
        chunks[c - 1].advance(p, s - size + at, s + at);
      }
    }
    T* d_last = d_states + i * size + at;
    std::copy_n(d_last, L.Kp * L.PW, d_chain + count * size + at);
    for (int64_t c = count - 1; c >= 0; --c) {
      T* ds = d_chain + (c + 1) * size + at;
      chunks[c].retreat_values(p, ds);
      chunks[c].retreat_state(p, ds, ds - size);
    }
    std::copy_n(d_chain + at, L.Kp * L.PW, d_last);
  }

  void load_panel(const T* from, size_t p, T* to) const {
    std::fill_n(to, L.Kp * L.PW, T(0));
    for (size_t i = 0; i < L.K && from != nullptr; ++i) {
      std::copy_n(from + i * L.V + p * L.PW, L.valid(p), to + i * L.PW);
    }
  }

  const DeltaRuleParams& x;
  const Layout<T> L;
  const int64_t max_chunks;  // between two waits of the threads for each other
  std::vector<Chunk> chunks;
  T *states, *d_chain, *d_states;  // [max_chunks], [max_chunks + 1], [group] states
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
