// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/test_time_memory/memory.cpp"
// clang-format off: foreach_target.h includes this file once per target and must come first.
#include "hwy/foreach_target.h"
// clang-format on
#include "gdn/base/parallel.h"
#include "gdn/kernels/scratch.h"
#include "gdn/kernels/test_time_memory/backward-inl.h"
#include "gdn/kernels/test_time_memory/forward-inl.h"
#include "gdn/kernels/test_time_memory/step-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Makes a worker on this thread's scratch memory; a dry construction tells how much it takes.
template <typename Worker, typename... Args>
Worker make_memory_worker(const Args&... args) {
  Carver dry(nullptr);
  Worker{args..., dry};
  Carver arena(thread_scratch(dry.used()));
  return Worker{args..., arena};
}

// Where each sequence's heads begin in `saved`, and how many numbers a head has there.
struct SavedPlace {
  int64_t begin, per_head;
};
template <typename Shape>
std::vector<SavedPlace> saved_places(const MemoryParams& p, const Shape& shape, int64_t segment) {
  std::vector<SavedPlace> places;
  int64_t at = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t chunks = test_time_memory::num_chunks(p, test_time_memory::tokens_of(p, n));
    const int64_t size = test_time_memory::num_kept(chunks, segment) *
                         test_time_memory::tensors_per_state(p) * static_cast<int64_t>(shape.flat);
    places.push_back({at, size});
    at += size * p.H;
  }
  return places;
}

template <typename T>
void memory_run_forward(const MemoryParams& p, const MemoryOutputs& out) {
  const int64_t segment = test_time_memory::segment(p);
  const auto places = saved_places(p, MemoryShape<T>(p), segment);
  parallel_for(0, p.num_sequences * p.H, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_memory_worker<MemoryForward<T>>(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.H, h = task % p.H;
      T* saved = static_cast<T*>(out.saved);
      if (saved != nullptr) saved += places[n].begin + h * places[n].per_head;
      worker.run(out, n, h, segment, saved);
    }
  });
}

template <typename T>
void memory_run_backward(const MemoryParams& p, const void* saved, const MemoryGrads& grads) {
  const int64_t segment = test_time_memory::segment(p);
  const auto places = saved_places(p, MemoryShape<T>(p), segment);
  parallel_for(0, p.num_sequences * p.H, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_memory_worker<MemoryBackward<T>>(p, segment);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.H, h = task % p.H;
      const T* kept = static_cast<const T*>(saved) + places[n].begin + h * places[n].per_head;
      worker.run(grads, n, h, segment, kept);
    }
  });
}

template <typename T>
void memory_run_step(const MemoryStep& step) {
  const MemoryParams& p = *step.params;
  parallel_for(0, p.num_sequences * p.H, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_memory_worker<MemoryStepper<T>>(step);
    for (int64_t task = begin; task < end; ++task) worker.run(task / p.H, task % p.H);
  });
}

void memory_forward(const MemoryParams& p, const MemoryOutputs& out) {
  p.dtype == DType::kF64 ? memory_run_forward<double>(p, out) : memory_run_forward<float>(p, out);
}
void memory_backward(const MemoryParams& p, const void* saved, const MemoryGrads& grads) {
  p.dtype == DType::kF64 ? memory_run_backward<double>(p, saved, grads)
                         : memory_run_backward<float>(p, saved, grads);
}
void memory_step(const MemoryStep& step) {
  step.params->dtype == DType::kF64 ? memory_run_step<double>(step) : memory_run_step<float>(step);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "gdn/base/check.h"

namespace gdn {
namespace {
HWY_EXPORT(memory_forward);
HWY_EXPORT(memory_backward);
HWY_EXPORT(memory_step);

void check(const MemoryParams& p, const char* op) {
  GDN_CHECK(p.dtype == DType::kF32 || p.dtype == DType::kF64, "[", op,
            "] the dtype must be float32 or float64");
  GDN_CHECK(p.num_sequences >= 0 && p.T >= 0 && p.H >= 1 && p.D >= 1, "[", op,
            "] H and D must be at least 1, got H=", p.H, " D=", p.D);
  GDN_CHECK(p.depth >= 1 && (p.depth == 1 || p.hidden >= 1), "[", op,
            "] depth and the hidden width must be at least 1, got ", p.depth, " and ", p.hidden);
  GDN_CHECK(p.chunk >= 1, "[", op, "] chunk must be at least 1, got ", p.chunk);
  GDN_CHECK(p.clip >= 0, "[", op, "] clip must not be negative, got ", p.clip);
  GDN_CHECK(!p.residual_norm || (p.norm_weight != nullptr && p.norm_bias != nullptr), "[", op,
            "] residual_norm needs norm_weight and norm_bias");
  if (p.rule == MemoryRule::kTtt) {
    GDN_CHECK(p.tau != nullptr && p.eta == nullptr && p.alpha == nullptr && p.anchor == nullptr &&
                  !p.sequential && !p.read_before,
              "[", op,
              "] the rule ttt takes tau, and no eta, alpha, anchor, sequential or "
              "read_before");
  } else {
    GDN_CHECK(
        !p.sequential || (p.depth == 1 && !p.residual_norm && p.clip == 0 && p.anchor == nullptr),
        "[", op, "] sequential is for depth 1 without norm, clip and anchor");
  }
}

}  // namespace

int64_t test_time_memory_size(int64_t D, int64_t depth, int64_t hidden, bool bias) {
  int64_t size = 0;
  for (int64_t l = 0; l < depth; ++l)
    size += ((l == 0 ? D : hidden) + (bias ? 1 : 0)) * (l + 1 == depth ? D : hidden);
  return size;
}

int64_t test_time_memory_saved_size(const MemoryParams& p) {
  const int64_t segment = test_time_memory::segment(p);
  int64_t states = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    states += test_time_memory::num_kept(
        test_time_memory::num_chunks(p, test_time_memory::tokens_of(p, n)), segment);
  }
  return states * test_time_memory::tensors_per_state(p) * p.H *
         test_time_memory_size(p.D, p.depth, p.hidden, p.bias);
}

void test_time_memory_forward(const MemoryParams& p, const MemoryOutputs& out) {
  check(p, "test_time_memory");
  HWY_DYNAMIC_DISPATCH(memory_forward)(p, out);
}

void test_time_memory_backward(const MemoryParams& p, const void* saved, const MemoryGrads& grads) {
  check(p, "test_time_memory_bwd");
  HWY_DYNAMIC_DISPATCH(memory_backward)(p, saved, grads);
}

void test_time_memory_step(const MemoryStep& step) {
  check(*step.params, "test_time_memory_step_");
  HWY_DYNAMIC_DISPATCH(memory_step)(step);
}

}  // namespace gdn
#endif
